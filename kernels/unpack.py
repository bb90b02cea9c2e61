"""Device helpers: words of kernel tiles to ``code - zero`` as A operands, in registers. Drawing in README.md.

Each width runs the PTX of `unpack_ptx.py` or, where there is none (other GPUs, Triton's interpreter, float32), shifts
and masks with the same result. A *fragment* is what a lane keeps of 32 columns, (S, 8, 4, 2, 2, 2, 2) for S strips:
[strip][g][t][hb][r8][i1][i0]. As a matrix it is the A operand: `columns128` and its like rename, they move nothing.
"""

# pyright: reportOperatorIssue=false, reportAssignmentType=false
# (only Triton's compiler knows that a constexpr is an int here)

import triton
import triton.language as tl


@triton.jit
def _square(a, b, c, d):
    """Four tensors [x][y], stacked along two new last dimensions."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _field(word, meta, LOW: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Portable: code - zero of the field at bit LOW of each byte, (..., i1, i0)."""
    MASK: tl.constexpr = (1 << BITS) - 1
    zero = meta & 0xFF
    b0 = (((word >> LOW) & MASK) - zero).to(DTYPE)
    b1 = (((word >> (8 + LOW)) & MASK) - zero).to(DTYPE)
    b2 = (((word >> (16 + LOW)) & MASK) - zero).to(DTYPE)
    b3 = (((word >> (24 + LOW)) & MASK) - zero).to(DTYPE)
    return _square(b0, b2, b1, b3)


@triton.jit
def _rows(f0, f1):
    """Fields (S, 8, 4, hb, i1, i0) of r8 = 0 and 1 to a fragment."""
    return tl.permute(tl.join(f0, f1), (0, 1, 2, 3, 6, 4, 5))


@triton.jit
def _registers(f0, f1, f2, f3):
    """Fields (S, 8, 4, i1, i0) of [hb][r8] to a fragment."""
    return tl.permute(_square(f0, f1, f2, f3), (0, 1, 2, 5, 6, 3, 4))


@triton.jit
def _unpack8(word, m, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr):
    """A word (S, 8, 4, hb, r8) holds one register."""
    m = m[:, :, None, None, :]
    if ASM is None:
        f = _field(word, m, 0, 8, DTYPE)
    else:
        o = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [word, m], (tl.int16,) * 4, is_pure=True, pack=1)
        f = _square(o[0], o[1], o[2], o[3]).to(DTYPE, bitcast=True)
    return f


@triton.jit
def _unpack4(word, m, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr):
    """A word (S, 8, 4, hb) holds two registers: r8."""
    m0, m1 = tl.split(m)
    m0, m1 = m0[:, :, None, None], m1[:, :, None, None]
    if ASM is None:
        f = _rows(_field(word, m0, 0, 4, DTYPE), _field(word, m1, 4, 4, DTYPE))
    else:
        o = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [word, m0, m1], (tl.int16,) * 8, is_pure=True, pack=1)
        f = _rows(_square(o[0], o[1], o[2], o[3]), _square(o[4], o[5], o[6], o[7])).to(DTYPE, bitcast=True)
    return f


@triton.jit
def _unpack2(word, m_low, m_high, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr):
    """A word (S, 8, 4, hb) holds four registers: [s][r8]."""
    m0, m1 = tl.split(m_low)
    m2, m3 = tl.split(m_high)
    m0, m1, m2, m3 = m0[:, :, None, None], m1[:, :, None, None], m2[:, :, None, None], m3[:, :, None, None]
    if ASM is None:
        low = _rows(_field(word, m0, 0, 2, DTYPE), _field(word, m1, 2, 2, DTYPE))
        high = _rows(_field(word, m2, 4, 2, DTYPE), _field(word, m3, 6, 2, DTYPE))
    else:
        o = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [word, m0, m1, m2, m3], (tl.int16,) * 16, is_pure=True, pack=1)
        low = _rows(_square(o[0], o[1], o[2], o[3]), _square(o[4], o[5], o[6], o[7])).to(DTYPE, bitcast=True)
        high = _rows(_square(o[8], o[9], o[10], o[11]), _square(o[12], o[13], o[14], o[15])).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def _unpack3(a, b, c, m_even, m_odd, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr):
    """Words (S, 8, 4) hold eight registers: [s][hb][r8]."""
    m0, m1 = tl.split(m_even)
    m2, m3 = tl.split(m_odd)
    m0, m1, m2, m3 = m0[:, :, None], m1[:, :, None], m2[:, :, None], m3[:, :, None]
    if ASM is None:
        r6 = ((a >> 5) & 0x06060606) | ((c >> 6) & 0x01010101)
        r7 = ((b >> 5) & 0x06060606) | ((c >> 7) & 0x01010101)
        even = _registers(
            _field(a, m0, 0, 3, DTYPE), _field(a, m1, 3, 3, DTYPE),
            _field(b, m0, 0, 3, DTYPE), _field(b, m1, 3, 3, DTYPE),
        )  # fmt: skip
        odd = _registers(
            _field(c, m2, 0, 3, DTYPE), _field(c, m3, 3, 3, DTYPE),
            _field(r6, m2, 0, 3, DTYPE), _field(r7, m3, 0, 3, DTYPE),
        )  # fmt: skip
    else:
        inputs = [a, b, c, m0, m1, m2, m3]
        o = tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (tl.int16,) * 32, is_pure=True, pack=1)
        even = _registers(
            _square(o[0], o[1], o[2], o[3]), _square(o[4], o[5], o[6], o[7]),
            _square(o[8], o[9], o[10], o[11]), _square(o[12], o[13], o[14], o[15]),
        ).to(DTYPE, bitcast=True)  # fmt: skip
        odd = _registers(
            _square(o[16], o[17], o[18], o[19]), _square(o[20], o[21], o[22], o[23]),
            _square(o[24], o[25], o[26], o[27]), _square(o[28], o[29], o[30], o[31]),
        ).to(DTYPE, bitcast=True)  # fmt: skip
    return even, odd


@triton.jit
def _load_vector(ptrs, FIRST: tl.constexpr, LENGTH: tl.constexpr):
    """LENGTH words of every lane: int32 (S, 8, 4, LENGTH / 2, 2)."""
    words = tl.load(ptrs[:, None] + (FIRST + tl.arange(0, 32 * LENGTH))[None, :])
    return tl.reshape(words, (ptrs.shape[0], 8, 4, LENGTH // 2, 2))


@triton.jit
def _split_first(words):
    """(S, 8, 4, 2, 2) to both halves of the fourth dimension."""
    return tl.split(tl.permute(words, (0, 1, 2, 4, 3)))


@triton.jit
def load_fragments(
    ptrs, m0, m1, m2, m3, BITS: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr
):
    """``code - zero`` of one step of S strips.

    Args:
        ptrs: (S,), to the first word of the step in each strip.
        m0, m1, m2, m3: int32 (S, 8, 2), [g][r8], meta of the step's four times 32 columns.
        BITS: 2, 3, 4 or 8.
        ASM: From `unpack_ptx`; None for the portable form.
        CONSTRAINTS: Likewise.
        DTYPE: Of the result: float16 or bfloat16, as ASM; anything floating if portable.

    Returns:
        Four fragments, s = 0 ... 3: (S, 8, 4, 2, 2, 2, 2), [strip][g][t][hb][r8][i1][i0].
    """
    if BITS == 8:
        f0 = _unpack8(_load_vector(ptrs, 0, 4), m0, ASM, CONSTRAINTS, DTYPE)
        f1 = _unpack8(_load_vector(ptrs, 128, 4), m1, ASM, CONSTRAINTS, DTYPE)
        f2 = _unpack8(_load_vector(ptrs, 256, 4), m2, ASM, CONSTRAINTS, DTYPE)
        f3 = _unpack8(_load_vector(ptrs, 384, 4), m3, ASM, CONSTRAINTS, DTYPE)
    elif BITS == 4:
        w0, w1 = _split_first(_load_vector(ptrs, 0, 4))
        w2, w3 = _split_first(_load_vector(ptrs, 128, 4))
        f0, f1 = _unpack4(w0, m0, ASM, CONSTRAINTS, DTYPE), _unpack4(w1, m1, ASM, CONSTRAINTS, DTYPE)
        f2, f3 = _unpack4(w2, m2, ASM, CONSTRAINTS, DTYPE), _unpack4(w3, m3, ASM, CONSTRAINTS, DTYPE)
    elif BITS == 2:
        even, odd = _split_first(_load_vector(ptrs, 0, 4))
        f0, f2 = _unpack2(even, m0, m2, ASM, CONSTRAINTS, DTYPE)
        f1, f3 = _unpack2(odd, m1, m3, ASM, CONSTRAINTS, DTYPE)
    else:
        ab0, ab1 = _split_first(_load_vector(ptrs, 0, 4))
        a0, b0 = tl.split(ab0)
        a1, b1 = tl.split(ab1)
        c0, c1 = tl.split(tl.reshape(_load_vector(ptrs, 128, 2), (ptrs.shape[0], 8, 4, 2)))
        f0, f1 = _unpack3(a0, b0, c0, m0, m1, ASM, CONSTRAINTS, DTYPE)
        f2, f3 = _unpack3(a1, b1, c1, m2, m3, ASM, CONSTRAINTS, DTYPE)
    return f0, f1, f2, f3


@triton.jit
def load_meta(meta_ptr, scales_ptr, offs, SCALES_BF16: tl.constexpr):
    """Zero points and scales that S strips have for one group of columns.

    Args:
        meta_ptr: int32 (groups, 16 * strips).
        scales_ptr: float32, likewise; None if scales are the upper halves of meta.
        offs: (S,), where the 16 words of each strip start.
        SCALES_BF16: Those halves are bfloat16, not float16.

    Returns:
        meta, the zero point in its lowest byte, and scales, float32: (S, 8, 2), [strip][g][r8].
    """
    offs = offs[:, None, None] + tl.arange(0, 8)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    meta = tl.load(meta_ptr + offs)
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + offs)
    elif SCALES_BF16:
        scales = (meta & -65536).to(tl.float32, bitcast=True)
    else:
        scales = (meta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return meta, scales


@triton.jit
def load_metas(
    meta_ptr, scales_ptr, step, groups, group_steps, strips, offs, SPAN: tl.constexpr, SCALES_BF16: tl.constexpr
):
    """Zero points and scales of a step's four times 32 columns.

    Args:
        meta_ptr, scales_ptr, SCALES_BF16: As in `load_meta`.
        step: Which.
        groups: Groups there are; columns past the last belong to it.
        group_steps: Steps that share a group, if SPAN is 128.
        strips: Strips there are.
        offs: (S,), where the 16 words of each strip start in a row of meta.
        SPAN: Columns of a step that share a group: 32, 64 or 128.

    Returns:
        Four meta, four scales, as from `load_meta`.
    """
    if SPAN == 128:
        offs += (step // group_steps).to(tl.int64) * strips * 16
        m0, s0 = load_meta(meta_ptr, scales_ptr, offs, SCALES_BF16)
        m1, m2, m3, s1, s2, s3 = m0, m0, m0, s0, s0, s0
    elif SPAN == 64:
        first = tl.minimum(step * 2, groups - 1).to(tl.int64) * strips * 16
        second = tl.minimum(step * 2 + 1, groups - 1).to(tl.int64) * strips * 16
        m0, s0 = load_meta(meta_ptr, scales_ptr, first + offs, SCALES_BF16)
        m2, s2 = load_meta(meta_ptr, scales_ptr, second + offs, SCALES_BF16)
        m1, m3, s1, s3 = m0, m2, s0, s2
    else:
        first = tl.minimum(step * 4, groups - 1).to(tl.int64) * strips * 16
        second = tl.minimum(step * 4 + 1, groups - 1).to(tl.int64) * strips * 16
        third = tl.minimum(step * 4 + 2, groups - 1).to(tl.int64) * strips * 16
        fourth = tl.minimum(step * 4 + 3, groups - 1).to(tl.int64) * strips * 16
        m0, s0 = load_meta(meta_ptr, scales_ptr, first + offs, SCALES_BF16)
        m1, s1 = load_meta(meta_ptr, scales_ptr, second + offs, SCALES_BF16)
        m2, s2 = load_meta(meta_ptr, scales_ptr, third + offs, SCALES_BF16)
        m3, s3 = load_meta(meta_ptr, scales_ptr, fourth + offs, SCALES_BF16)
    return m0, m1, m2, m3, s0, s1, s2, s3


@triton.jit
def by_row(scales):
    """(S, 8, 2) as from `load_meta` to (16 S,), in the order of rows."""
    return tl.reshape(tl.permute(scales, (0, 2, 1)), (16 * scales.shape[0],))


@triton.jit
def columns32(f):
    """One fragment as a matrix (16 S, 32)."""
    return tl.reshape(tl.permute(f, (0, 4, 1, 3, 5, 2, 6)), (16 * f.shape[0], 32))


@triton.jit
def columns64(f0, f1):
    """Two fragments as a matrix (16 S, 64)."""
    return tl.reshape(tl.permute(tl.join(f0, f1), (0, 4, 1, 7, 3, 5, 2, 6)), (16 * f0.shape[0], 64))


@triton.jit
def columns128(f0, f1, f2, f3):
    """A step as a matrix (16 S, 128)."""
    return tl.reshape(tl.permute(_square(f0, f1, f2, f3), (0, 4, 1, 7, 8, 3, 5, 2, 6)), (16 * f0.shape[0], 128))
