"""x as integers, as digits.py makes them, found by the programs of decode.py themselves. Gluon, NVIDIA from sm_80 on.

A lane has eight columns of a step, which are whole words of digits, and a warp two steps at a time; digits and sums go
where decode.py would have copied them. Source: this project.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# (Gluon's own types are constexprs here and tensors there)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .common import Constants
from .digits import digits_of, units
from .integer_ptx import digits_asm, largest_asm


class Halves(Constants):
    """PTX of x to digits, as one constexpr.

    Args:
        bf16: Whether x is bfloat16, not float16.
    """

    def __init__(self, bf16: bool) -> None:
        self.key = (bf16,)
        self.dtype = gl.bfloat16 if bf16 else gl.float16
        self.largest, self.largest_constraints = map(gl.constexpr, largest_asm(bf16))
        self.digits, self.digits_constraints = map(gl.constexpr, digits_asm(bf16))


@gluon.jit
def _pair(x_ptr, first, inside, K, PAIRS: gl.constexpr):
    """Columns first and first + 1 as the halves of a word; PAIRS: they lie in one word of x."""
    if PAIRS:
        ptrs = (x_ptr + first).to(gl.pointer_type(gl.int32), bitcast=True)
        pair = gl.load(ptrs, mask=inside & (first < K), other=0)
    else:
        halves = ()
        for i in gl.static_range(2):
            half = gl.load(x_ptr + (first + i), mask=inside & (first + i < K), other=0.0)
            halves = halves + (half.to(gl.int16, bitcast=True).to(gl.int32),)
        pair = halves[0] & 0xFFFF | halves[1] << 16
    return pair


@gluon.jit
def _load_columns(x_ptr, at, inside, K, PAIRS: gl.constexpr):
    """Columns at, at + 1, 8 more, and 16 more of the tiles, as words of two."""
    words = ()
    for word in gl.static_range(4):
        words = words + (_pair(x_ptr, at + (word // 2 * 16 + word % 2 * 8), inside, K, PAIRS),)
    return words


@gluon.jit
def wrapped(step, around):
    """After ``around`` steps comes the first, unless that is None."""
    return step if around is None else gl.where(step < around, step, step - around)


@gluon.jit
def load_order(order_ptr, first, end, around, PASSES: gl.constexpr, PASS: gl.constexpr, OL: gl.constexpr):
    """The columns of x that steps first ... end have, PASS steps at a time; -1 for none."""
    offs = gl.arange(0, PASS * 128, OL)
    out = ()
    for p in gl.static_range(PASSES):
        step = wrapped(first + p * PASS + offs // 128, around)
        out = out + (gl.load(order_ptr + (step * 128 + offs % 128), mask=step < end, other=-1),)
    return out


@gluon.jit
def _ordered(row, order, XL: gl.constexpr):
    """Columns of a row, words of two, by a pass of the order, as `_load_columns` has them."""
    PASS: gl.constexpr = order.shape[0] // 128
    at = gl.maximum(order, 0)
    values = gl.gather(row, at >> 1, 0)
    values = gl.where(order < 0, 0, (values >> (at & 1) * 16) & 0xFFFF)
    # column 32 s + 16 hb + 8 i1 + 2 t + i0
    values = values.reshape((PASS, 4, 2, 2, 4, 2)).permute((0, 1, 4, 2, 3, 5)).reshape((PASS, 16, 2, 2, 2))
    low, high = gl.split(values)
    pairs = low | high << 16  # [PASS, 16, hb, i1]
    first, second = gl.split(pairs)
    a, c = gl.split(first)
    b, d = gl.split(second)
    words = ()
    for word in gl.static_range(4):
        words = words + (gl.convert_layout((a, b, c, d)[word], XL, assert_trivial=True),)
    return words


@gluon.jit
def _digits_of(words, X: gl.constexpr):
    """Of rows and steps, [P, 16 lanes 4 s + t]: words of digits [P, 16, hb, digit], units [P], minus lanes' sums."""
    largest = gl.inline_asm_elementwise(X.largest, X.largest_constraints, words, dtype=gl.int32, is_pure=True, pack=1)
    largest = gl.max(largest, 1).to(gl.int16).to(X.dtype, bitcast=True).to(gl.float32)
    per_unit, unit = units(largest.to(gl.int32, bitcast=True))
    per_unit = gl.expand_dims(per_unit, 1).broadcast_to(words[0].shape)
    high0, high1, low0, low1, total = digits_of(words, per_unit, X.dtype, X.digits, X.digits_constraints)
    return gl.join(gl.join(high0, high1), gl.join(low0, low1)), unit, total


@gluon.jit
def write_digits(
    digits, sums, x_ptr, order, first, end, around, K, stride_xm,
    ROWS: gl.constexpr, PASSES: gl.constexpr, PASS: gl.constexpr, SUBGROUPS: gl.constexpr, PAIRS: gl.constexpr,
    X: gl.constexpr, XL: gl.constexpr, TL: gl.constexpr, RL: gl.constexpr, NUMBERS: gl.constexpr,
):  # fmt: skip
    """What digits.py writes, of steps first ... end, for one tile of ROWS rows of x; PASS steps at a time.

    With an order, of each pass, whole rows of NUMBERS columns are loaded, a power of two, and put in order by way of
    shared memory.
    """
    if order is not None:
        first_of_pair = gl.arange(0, NUMBERS // 2, RL) * 2
        rows = ()
        for m in gl.static_range(ROWS):
            rows = rows + (_pair(x_ptr + m * stride_xm, first_of_pair, first_of_pair >= 0, K, PAIRS),)
    begin = gl.expand_dims(gl.arange(0, PASS, gl.SliceLayout(1, XL)), 1) + first
    lane = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, XL)), 0)  # 4 s + t
    column = lane // 4 * 32 + lane % 4 * 2
    # lane 4 n + t has the words (s, hb) of column n = 2 (SUBGROUPS m + u) + digit: [s // 2][m, u][digit, t, s % 2, hb]
    digits = digits._reinterpret(gl.int32, [PASSES, PASS, 2, 4, 32], gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]))
    # SUBGROUPS m + u: the unit and minus the sum of row m over subgroup u
    sums = sums._reinterpret(gl.int32, [PASSES, PASS, 4, 2], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    SL: gl.constexpr = gl.SliceLayout(2, TL)
    AHEAD: gl.constexpr = max(1, 4 // ROWS) if order is None else 1  # passes whose loads are in flight together
    for p in gl.static_range(PASSES):
        if p % AHEAD == 0:
            x = ()
            for i in gl.static_range(min(AHEAD, PASSES - p)):
                step = wrapped(begin + (p + i) * PASS, around)
                for m in gl.static_range(ROWS):
                    if order is None:
                        x = x + (_load_columns(x_ptr + m * stride_xm, step * 128 + column, step < end, K, PAIRS),)
                    else:
                        x = x + (_ordered(rows[m], order[p], XL),)
        for m in gl.static_range(ROWS):
            words, unit, total = _digits_of(x[p % AHEAD * ROWS + m], X)
            words = words.reshape((PASS, 2, 2, 4, 2, 2)).permute((0, 1, 5, 3, 2, 4)).reshape((PASS, 2, 1, 32))
            for u in gl.static_range(SUBGROUPS):
                own = words if SUBGROUPS == 1 else gl.where(_subgroup(words, SUBGROUPS) == u, words, 0)
                digits.index(p).slice(SUBGROUPS * m + u, 1, dim=2).store(own)
            total = gl.convert_layout(gl.sum(total.reshape((PASS, SUBGROUPS, 16 // SUBGROUPS)), 2), SL)
            unit = gl.convert_layout(unit.to(gl.int32, bitcast=True), gl.SliceLayout(1, SL))
            unit = gl.expand_dims(gl.expand_dims(unit, 1), 2)
            which = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(0, TL))), 0), 0)
            both = gl.where(which == 0, unit, gl.expand_dims(total, 2))
            sums.index(p).slice(SUBGROUPS * m, SUBGROUPS, dim=1).store(both)


@gluon.jit
def _subgroup(words, SUBGROUPS: gl.constexpr):
    """That of each of the words [PASS, s // 2, 1, (digit, t, s % 2, hb)], [1, 2, 1, 32]."""
    WL: gl.constexpr = words.type.layout
    half = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, WL))))
    half = gl.expand_dims(gl.expand_dims(gl.expand_dims(half, 0), 2), 3)
    rest = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, WL))))
    rest = gl.expand_dims(gl.expand_dims(gl.expand_dims(rest, 0), 1), 2)
    return (2 * half + rest // 2 % 2) * SUBGROUPS // 4
