"""Words of a ring in shared memory to A operands of W, in registers, for products of warpgroups. Gluon, sm_90.

A warpgroup has four strips, a warp each, and takes a step of 128 columns in quarters of 32: ``code - zero`` times
scale, rounded as dequantize.py rounds it, each where tensor cores want it. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false
# (Gluon's own types are constexprs here and tensors there)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import Constants, bits_of, linear
from .unpack_ptx import scale_ptx, weights_ptx

STRIPS = gl.constexpr(4)  # of a warpgroup: a warp each


class Form(Constants):
    """What depends on the width of the codes, dtypes and groups, as one constexpr.

    Args:
        bits: 2, 3, 4 or 8.
        bf16: Whether x is bfloat16, not float16.
        scales_bf16: Whether scales are.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
    """

    def __init__(self, bits: int, bf16: bool, scales_bf16: bool, group_columns: int) -> None:
        strips = STRIPS.value
        lanes, warps = bits_of(32), [[1, 0], [2, 0]]
        self.key = (bits, bf16, scales_bf16, group_columns)
        asm, constraints, parts = scale_ptx(bf16, scales_bf16)
        texts = [weights_ptx(bits, bf16, quarter, parts) for quarter in range(4)]
        self.keep(
            bits=bits,
            half=gl.bfloat16 if bf16 else gl.float16,
            scale=asm,
            scale_constraints=constraints,
            parts=parts,
            weights=tuple(text for text, _ in texts),
            constraints=tuple(c for _, c in texts),
            outputs={8: 4, 4: 8, 2: 8, 3: 16}[bits],
            vectors={8: 4, 4: 2, 2: 1, 3: 1}[bits],
            group_steps=max(1, group_columns // 128),
            subgroups=max(1, 128 // group_columns),
            words_layout=linear([[0, 1], [0, 2]], [[0, 4 * b] for b in lanes], warps, [strips, 128]),
            rest_layout=linear([[0, 1]], [[0, 2 * b] for b in lanes], warps, [strips, 64]),
            meta_layout=linear(
                [[0, 1]], [[0, 0]] * 2 + [[0, 2 * b] for b in bits_of(8)], [[0, 16], [0, 32]], [1, 16 * strips]
            ),
        )


@gluon.jit
def _split_fourth(words):
    """[s, g, t, 2, 2] to both halves of the fourth dimension."""
    return gl.split(words.permute((0, 1, 2, 4, 3)))


@gluon.jit
def _load_vector(words, index, group: gl.constexpr, C: gl.constexpr):
    """Four words of every lane: [strip, g, t, 2, 2]."""
    vector = words.index(index).slice(STRIPS * group, STRIPS, dim=0).load(C.words_layout)
    return vector.reshape((STRIPS, 8, 4, 2, 2))


@gluon.jit
def load_words(words, rest, stage, group: gl.constexpr, C: gl.constexpr):
    """The words of a step, for each quarter those it needs: [strip, g, t, ...] as `weights_ptx` says."""
    first = _load_vector(words, stage * C.vectors, group, C)
    if C.bits == 2:
        even, odd = _split_fourth(first)
        quarters = ((even,), (odd,), (even,), (odd,))
    elif C.bits == 3:
        low0, low1 = _split_fourth(first)
        a0, b0 = gl.split(low0)
        a1, b1 = gl.split(low1)
        high = rest.index(stage).slice(STRIPS * group, STRIPS, dim=0).load(C.rest_layout)
        c0, c1 = gl.split(high.reshape((STRIPS, 8, 4, 2)))
        c0 = gl.convert_layout(c0, a0.type.layout, assert_trivial=True)
        c1 = gl.convert_layout(c1, a0.type.layout, assert_trivial=True)
        quarters = ((a0, b0), (a0, b0, c0), (a1, b1), (a1, b1, c1))
    elif C.bits == 4:
        q0, q1 = _split_fourth(first)
        q2, q3 = _split_fourth(_load_vector(words, stage * C.vectors + 1, group, C))
        quarters = ((q0,), (q1,), (q2,), (q3,))
    else:
        second = _load_vector(words, stage * C.vectors + 1, group, C)
        third = _load_vector(words, stage * C.vectors + 2, group, C)
        fourth = _load_vector(words, stage * C.vectors + 3, group, C)
        quarters = ((first,), (second,), (third,), (fourth,))
    return quarters


@gluon.jit
def load_meta(meta, stage, group: gl.constexpr, C: gl.constexpr):
    """For each subgroup of a step its words of meta, [strip, g, r8]."""
    rows = ()
    for u in gl.static_range(C.subgroups):
        row = meta.index(stage).slice(u, 1, dim=0).slice(16 * STRIPS * group, 16 * STRIPS, dim=1)
        rows = rows + (row.load(C.meta_layout).reshape((STRIPS, 8, 2)),)
    return rows


@gluon.jit
def _over_words(v, words):
    """[strip, g] or [strip, g, r8] to the shape of words, [strip, g, t], [strip, g, t, hb] or [strip, g, t, hb, r8]."""
    L: gl.constexpr = words.type.layout
    if len(words.shape) > 3:
        v = gl.convert_layout(v, gl.SliceLayout(2, gl.SliceLayout(3, L)), assert_trivial=True)
        v = gl.expand_dims(gl.expand_dims(v, 2), 3)
    else:
        v = gl.convert_layout(v, gl.SliceLayout(2, L), assert_trivial=True)
        v = gl.expand_dims(v, 2)
    return v.broadcast_to(words.shape)


@gluon.jit
def _scale(meta, C: gl.constexpr):
    """The scale in each word of meta, as `scale_ptx` says."""
    if C.parts == 1:
        scale = (
            gl.inline_asm_elementwise(C.scale, C.scale_constraints, (meta,), dtype=gl.int32, is_pure=True, pack=1),
        )
    else:
        scale = gl.inline_asm_elementwise(
            C.scale, C.scale_constraints, (meta,), dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    return scale


@gluon.jit
def weights(words, meta, S: gl.constexpr, C: gl.constexpr, A: gl.constexpr):
    """Quarter S of a step as an A operand, [16 STRIPS, 32]."""
    inputs = words
    if C.bits == 8:
        m = _over_words(meta, words[0])
        inputs = inputs + (m,) + _scale(m, C)
    else:
        m0, m1 = gl.split(meta)
        m0 = _over_words(m0, words[0])
        m1 = _over_words(m1, words[0])
        inputs = inputs + (m0, m1) + _scale(m0, C) + _scale(m1, C)
    out = gl.inline_asm_elementwise(
        C.weights[S], C.constraints[S], inputs, dtype=(gl.int16,) * C.outputs, is_pure=True, pack=1
    )
    for level in gl.static_range(2 if C.bits == 8 else 4 if C.bits == 3 else 3):
        pairs = ()
        for i in gl.static_range(C.outputs >> (level + 1)):
            pairs = pairs + (gl.join(out[2 * i], out[2 * i + 1]),)
        out = pairs
    if C.bits == 8:  # strip, g, t, hb, r8, i0, i1
        a = out[0].permute((0, 4, 1, 3, 6, 2, 5))
    elif C.bits == 3:  # strip, g, t, i0, i1, r8, hb
        a = out[0].permute((0, 5, 1, 6, 4, 2, 3))
    else:  # strip, g, t, hb, i0, i1, r8
        a = out[0].permute((0, 6, 1, 3, 5, 2, 4))
    a = a.reshape((16 * STRIPS, 32)).to(C.half, bitcast=True)
    return gl.convert_layout(a, A, assert_trivial=True)
