"""Words of kernel tiles to A operands of ``W.T``, in registers, for products of warpgroups. Gluon, sm_90.

A step of 128 columns k has eight times 16 of them, ``2 s + hb`` in README.md's drawing. Each is a warp's, of two
warpgroups, so a lane needs just one word of a strip (8 bits: two; 3 bits: one of three, mostly). ``code - zero`` times
scale is rounded as dequantize.py rounds it; ``movmatrix`` then turns 8 x 8 weights over, a register of every lane.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportAssignmentType=false, reportOperatorIssue=false
# (Gluon's own types are constexprs here and tensors there)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import Constants, bits_of, linear
from .unpack_ptx import transposed_ptx

STRIPS = gl.constexpr(4)  # of a product


class Form(Constants):
    """What depends on the width of the codes, dtypes and groups, as one constexpr.

    Args:
        bits: 2, 3, 4 or 8.
        bf16: Whether dy and dx are bfloat16, not float16.
        scales_bf16: Likewise, scales.
        subgroups: Groups to a step: 1, 2 or 4.
        products: Of a stage: 1 or 2, each of 64 rows of W.
    """

    def __init__(self, bits: int, bf16: bool, scales_bf16: bool, subgroups: int, products: int) -> None:
        n = STRIPS.value
        self.key = (bits, bf16, scales_bf16, subgroups, products)
        asm = [transposed_ptx(bits, upper, bf16, bf16 != scales_bf16) for upper in (False, True)]
        strips = [[b, 0] for b in bits_of(n)]
        lanes = [[0, 4 * b] for b in bits_of(32)]
        if bits == 8:
            words = linear([[0, 1], *strips], lanes, [[0, 2], [0, 128]], [n, 256])
        elif bits == 3:
            words = linear([[0, 1], [0, 2], *strips], lanes, [[0, 0], [0, 0]], [n, 128])
        else:
            words = linear(strips, lanes, [[0, 1], [0, 2]], [n, 128])
        of_warp = [[0, 0], [1, 0] if subgroups == 4 else [0, 0]]
        self.keep(
            bits=bits,
            products=products,
            strips=n * products,  # of a stage
            dtype=gl.bfloat16 if bf16 else gl.float16,
            scales=gl.bfloat16 if scales_bf16 else gl.float16,
            mixed=bf16 != scales_bf16,
            width=256 if bits == 8 else 128,  # words of a box
            boxes=2 if bits in (4, 8) else 1,
            meta_boxes=min(subgroups, 2),
            meta_rows=max(1, subgroups // 2),  # of a box
            subgroups=subgroups,
            lower_asm=asm[0][0],
            upper_asm=asm[1][0],
            constraints=asm[0][1],
            words=words,
            low_words=linear([[0, 1], *strips], [[0, 2 * b] for b in bits_of(32)], [[0, 0], [0, 0]], [n, 64]),
            meta=linear(
                [[0, 1], *[[0, 16 * b] for b in bits_of(n)]], [[0, 0]] * 2 + [[0, 2 * b] for b in bits_of(8)],
                of_warp, [max(1, subgroups // 2), 16 * n],
            ),
            lanes=linear(
                [[b, 0, 0] for b in bits_of(n)], [[0, b, 0] for b in bits_of(32)], [[0, 0, 1], [0, 0, 2]],
                [n, 32, 4],
            ),
            spread=linear(
                [[b, 0, 0, 0, 0] for b in bits_of(n)],
                [[0, 0, b, 0, 0] for b in bits_of(4)] + [[0, b, 0, 0, 0] for b in bits_of(8)],
                [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]], [n, 8, 4, 2, 2],
            ),
        )  # fmt: skip


@gluon.jit
def _square(a, b, c, d):
    """Four tensors, stacked along two new last dimensions."""
    return gl.join(gl.join(a, c), gl.join(b, d))


@gluon.jit
def _pick(pairs, SECOND: gl.constexpr):
    """One half of the last dimension, of two."""
    a, b = gl.split(pairs)
    return b if SECOND else a


@gluon.jit
def _for_each_warp(v, F: gl.constexpr):
    """[strip, lane] to [strip, lane, warp]."""
    v = gl.convert_layout(v, gl.SliceLayout(2, F.lanes), assert_trivial=True)
    return gl.expand_dims(v, 2).broadcast_to((v.shape[0], 32, 4))


@gluon.jit
def _words(words, low_words, slot, part: gl.constexpr, UPPER: gl.constexpr, F: gl.constexpr):
    """The words from which a warp takes its columns: [strip, lane, warp] each."""
    S: gl.constexpr = STRIPS
    w = words.index(slot * F.boxes + (UPPER if F.boxes == 2 else 0)).slice(S * part, S, dim=0).load(F.words)
    if F.bits == 3:
        a, b = gl.split(_pick(w.reshape((S, 32, 2, 2)).permute((0, 1, 3, 2)), UPPER))
        c = _pick(low_words.index(slot).slice(S * part, S, dim=0).load(F.low_words).reshape((S, 32, 2)), UPPER)
        which = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, F.lanes)))
        which = gl.expand_dims(gl.expand_dims(which, 0), 1).broadcast_to((S, 32, 4))
        out = (_for_each_warp(a, F), _for_each_warp(b, F), _for_each_warp(c, F), which)
    elif F.bits == 8:
        w0, w1 = gl.split(w.reshape((S, 2, 32, 2, 2)).permute((0, 2, 1, 3, 4)))
        w0 = gl.convert_layout(w0.reshape((S, 32, 4)), F.lanes, assert_trivial=True)
        w1 = gl.convert_layout(w1.reshape((S, 32, 4)), F.lanes, assert_trivial=True)
        out = (w0, w1)
    else:
        out = (gl.convert_layout(w.reshape((S, 32, 4)), F.lanes, assert_trivial=True),)
    return out


@gluon.jit
def _spread(m, S: gl.constexpr, F: gl.constexpr):
    """Numbers [row, strip, g] for the lanes and warps that need them, [strip, lane, warp]."""
    if F.meta_rows == 2:
        m = m.permute((1, 2, 0))
        m = gl.convert_layout(m, gl.SliceLayout(2, gl.SliceLayout(4, F.spread)), assert_trivial=True)
        m = gl.expand_dims(gl.expand_dims(m, 2), 4)
    else:
        m = m.reshape((S, 8))
        m = gl.convert_layout(m, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, F.spread))), assert_trivial=True)
        m = gl.expand_dims(gl.expand_dims(gl.expand_dims(m, 2), 3), 4)
    m = m.broadcast_to((S, 8, 4, 2, 2)).reshape((S, 32, 4))
    return gl.convert_layout(m, F.lanes, assert_trivial=True)


@gluon.jit
def operand(words, low_words, meta, slot, part: gl.constexpr, UPPER: gl.constexpr, F: gl.constexpr, A: gl.constexpr):
    """Half a step of W.T, 64 columns k of a part of a stage's strips, as the A operand [64, 64]."""
    S: gl.constexpr = STRIPS
    w = _words(words, low_words, slot, part, UPPER, F)
    m = meta.index(slot * F.meta_boxes + (UPPER if F.meta_boxes == 2 else 0))
    m = m.slice(16 * S * part, 16 * S, dim=1).load(F.meta)
    m0, m1 = gl.split(m.reshape((F.meta_rows, S, 8, 2)))
    inputs = w + (_spread(m0, S, F), _spread(m1, S, F))
    if F.mixed:
        s0 = (m0 >> 16).to(gl.int16).to(F.scales, bitcast=True).to(gl.float32)
        s1 = (m1 >> 16).to(gl.int16).to(F.scales, bitcast=True).to(gl.float32)
        inputs = inputs + (_spread(s0, S, F), _spread(s1, S, F))
    o = gl.inline_asm_elementwise(
        F.upper_asm if UPPER else F.lower_asm, F.constraints, inputs, dtype=(gl.int16,) * 8, is_pure=True, pack=1
    )
    # strip, lane, warp, r8, n % 2, i1
    a = gl.join(_square(o[0], o[1], o[2], o[3]), _square(o[4], o[5], o[6], o[7])).to(F.dtype, bitcast=True)
    a = a.reshape((S, 8, 4, 4, 2, 2, 2)).permute((3, 6, 1, 0, 4, 2, 5)).reshape((64, 16 * S))
    return gl.convert_layout(a, A, assert_trivial=True)
