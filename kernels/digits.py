"""x as integers: two signed digits to the base 256 for each number, one unit for 128 of them. Plain Triton.

    x[m, k] = unit[m, k // 128] * (256 high[m, k] + low[m, k]) + error,   |error| <= unit / 2

The unit is the power of two that makes the largest number of the 128 fill 15 bits, so numbers within a factor of 16 of
it (bfloat16: 128) are exact. Digits come in the order in which the decode kernel feeds them to the tensor cores,
act-order applied. Dispatch runs it before the decode kernel. A number that is not finite makes the unit NaN, hence the
row of y.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .integer_ptx import digits_asm, largest_asm
from .launch import Launch, prepare


@triton.jit
def units(largest):
    """By the bits of the largest float32, without its sign: one divided by the unit, and the unit."""
    # 32639 = 127 * 256 + 127 is the largest number of two signed digits
    exponent = ((largest.to(tl.float32, bitcast=True) * (32768 / 32639)).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -110)
    unit = tl.where(largest < 0x7F800000, ((113 + exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    return ((141 - exponent) << 23).to(tl.float32, bitcast=True), unit


@triton.jit
def _pair(ptr, first, second, K):
    """Columns ``first`` and ``second`` of a row as the halves of a word; 0 outside."""
    low = tl.load(ptr + first, mask=(first >= 0) & (first < K), other=0).to(tl.int16, bitcast=True)
    high = tl.load(ptr + second, mask=(second >= 0) & (second < K), other=0).to(tl.int16, bitcast=True)
    return low.to(tl.int32) & 0xFFFF | high.to(tl.int32) << 16


@triton.jit
def _largest(words, HALF: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """Of four words of two halves, the largest without its sign, as the bits of a float32."""
    if ASM is None:
        largest = tl.zeros_like(words[0])
        for i in tl.static_range(4):
            low, high = _floats(words[i], HALF)
            largest = tl.maximum(largest, low.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            largest = tl.maximum(largest, high.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        largest = tl.inline_asm_elementwise(ASM, CONSTRAINTS, words, tl.int32, is_pure=True, pack=1)
        largest = largest.to(tl.int16).to(HALF, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return largest


@triton.jit
def _floats(word, HALF: tl.constexpr):
    """The halves of a word."""
    low = word.to(tl.int16).to(HALF, bitcast=True).to(tl.float32)
    return low, (word >> 16).to(tl.int16).to(HALF, bitcast=True).to(tl.float32)


@triton.jit
def digits_of(words, per_unit, HALF: tl.constexpr, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr):
    """Of words [hb][i1] with halves [i0]: high digits [hb], low ones [hb], byte 2 i0 + i1 each, and minus the sum."""
    if ASM is None:
        total = tl.zeros_like(words[0])
        highs, lows = (), ()
        for hb in tl.static_range(2):
            high_word, low_word = tl.zeros_like(total), tl.zeros_like(total)
            for i1 in tl.static_range(2):
                halves = _floats(words[2 * hb + i1], HALF)
                for i0 in tl.static_range(2):
                    # to nearest, by the addition's rounding
                    q = (halves[i0] * per_unit + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
                    high_word |= (((q + 128) >> 8) & 255) << 16 * i0 + 8 * i1
                    low_word |= (q & 255) << 16 * i0 + 8 * i1
                    total -= q
            highs, lows = highs + (high_word,), lows + (low_word,)
        out = highs + lows + (total,)
    else:
        inputs = words + (per_unit,)
        out = tl.inline_asm_elementwise(ASM, CONSTRAINTS, inputs, (tl.int32,) * 5, is_pure=True, pack=1)
    return out


@triton.jit(do_not_specialize=["K", "steps", "stride_xm"], do_not_specialize_on_alignment=["x_ptr"])
def digits_kernel(
    x_ptr, order_ptr, digits_ptr, sums_ptr, K, steps, stride_xm,
    TILES: tl.constexpr, ROWS: tl.constexpr, SUBGROUPS: tl.constexpr, TURNS: tl.constexpr, STEPS: tl.constexpr,
    PAIRS: tl.constexpr, LARGEST: tl.constexpr, LARGEST_CONSTRAINTS: tl.constexpr, DIGITS: tl.constexpr,
    DIGITS_CONSTRAINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """STEPS steps of a row of x a program, one warp: a lane has eight columns, which are whole words of digits."""
    if PDL:
        gdc_launch_dependents()  # the product, which waits for this kernel
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(1)
    step = (tl.program_id(0) * STEPS + tl.arange(0, STEPS))[:, None]
    s = tl.arange(0, 16)[None, :] // 4
    t = tl.arange(0, 16)[None, :] % 4
    present = step < steps

    # Load columns 32 s + 16 hb + 8 i1 + 2 t + i0
    at = step * 128 + 32 * s + 2 * t
    ptr = x_ptr + m.to(tl.int64) * stride_xm
    words = ()
    if order_ptr is None:
        if PDL:
            gdc_wait()
        for i in tl.static_range(4):
            first = at + (i // 2 * 16 + i % 2 * 8)
            if PAIRS:
                word = tl.load((ptr + first).to(tl.pointer_type(tl.int32), bitcast=True), mask=first < K, other=0)
            else:
                word = _pair(ptr, first, first + 1, K)
            words = words + (word,)
    else:
        columns = ()
        for i in tl.static_range(4):
            from_order = (order_ptr + at + (i // 2 * 16 + i % 2 * 8)).to(tl.pointer_type(tl.int64), bitcast=True)
            columns = columns + (tl.load(from_order, mask=present, other=-1),)
        if PDL:
            gdc_wait()
        for i in tl.static_range(4):
            words = words + (_pair(ptr, columns[i].to(tl.int32), (columns[i] >> 32).to(tl.int32), K),)

    # To integers of at most 15 bits and a sign
    largest = tl.max(_largest(words, HALF, LARGEST, LARGEST_CONSTRAINTS), 1)  # the order of floats, NaN above all
    per_unit, unit = units(largest)
    per_unit = tl.broadcast_to(per_unit[:, None], (STEPS, 16))
    high0, high1, low0, low1, total = digits_of(words, per_unit, HALF, DIGITS, DIGITS_CONSTRAINTS)

    # Store
    unit = unit.to(tl.int32, bitcast=True)[:, None]
    if ROWS == 0:
        # for decode.py: tiles of eight columns n = 2 (SUBGROUPS m + u) + digit, 0 outside of subgroup u; words
        # [s // 2][lane 4 n + t][s % 2][hb]
        TILE: tl.constexpr = 4 // SUBGROUPS  # rows of x
        place = m % TILE * SUBGROUPS  # of the first subgroup
        tile = step * TILES + m // TILE
        for u in tl.static_range(SUBGROUPS):
            inside = s * SUBGROUPS // 4 == u
            ptrs = digits_ptr + tile * 256 + s // 2 * 128 + (place + u) * 32 + t * 4 + s % 2 * 2
            tl.store(ptrs, tl.where(inside, high0, 0), mask=present)
            tl.store(ptrs + 1, tl.where(inside, high1, 0), mask=present)
            tl.store(ptrs + 16, tl.where(inside, low0, 0), mask=present)
            tl.store(ptrs + 17, tl.where(inside, low1, 0), mask=present)
        # SUBGROUPS m + u: unit, sums in turn
        GROUPS: tl.constexpr = SUBGROUPS * TURNS
        sums = tl.sum(tl.reshape(total, (STEPS, GROUPS, 16 // GROUPS)), 2)
        group = tl.arange(0, GROUPS)[None, :]
        ptrs = sums_ptr + (tile * 4 + place + group // TURNS) * (2 * TURNS)
        tl.store(ptrs, unit, mask=present)
        tl.store(ptrs + 1 + group % TURNS, sums, mask=present)
    else:
        # for wide.py: rows 2 m + digit of 128 bytes, words [s][hb][t]
        ptrs = digits_ptr + step * (64 * ROWS) + m * 64 + s * 8 + t
        tl.store(ptrs, high0, mask=present)
        tl.store(ptrs + 4, high1, mask=present)
        tl.store(ptrs + 32, low0, mask=present)
        tl.store(ptrs + 36, low1, mask=present)
        # units, then sums; a lane 4 g + t reads all rows 4 j + t at once
        turn = tl.arange(0, TURNS)[None, :]
        ptrs = sums_ptr + step * (2 * TURNS * ROWS) + m % 4 * (ROWS // 4) + m // 4
        tl.store(ptrs, unit, mask=present)
        tl.store(ptrs + (1 + turn) * ROWS, tl.sum(tl.reshape(total, (STEPS, TURNS, 16 // TURNS)), 2), mask=present)


def prepare_digits(
    device: int, dtype: torch.dtype, *, ordered: bool, subgroups: int, turns: int, tiles: int, rows: int,
    aligned: bool, pdl: bool,
) -> Launch:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of x: float16 or bfloat16.
        ordered: Whether there is an order.
        subgroups: For decode.py: groups of a step with columns of their own, 1, 2 or 4; else 1.
        turns: Groups of a step that share columns, 1, 2 or 4.
        tiles: For decode.py: tiles of 4 / subgroups rows of x; else 0.
        rows: For wide.py: rows of x in a block; else 0.
        aligned: K is even, and rows of x start at multiples of 4 bytes.
        pdl: Programmatic dependent launch (sm_90 on).

    Returns:
        ``launch(steps, M, stream, x, order, digits, sums, K, stride_xm)``, which writes what belongs to rows of x:

        - x: (M, K), unit stride along K.
        - order: int32 (steps * 128,), the column of x for each column of the tiles, -1 for 0; or None.
        - digits: for decode.py int32 (steps, tiles, 256); for wide.py (steps, rows, 64).
        - sums: for decode.py int32 (steps, tiles, 4, 2 * turns), for wide.py (steps, 2 * turns, rows): the bits of
          the unit and minus the sum of each group.
    """
    names = constants(dtype == torch.bfloat16, ordered, tiles, rows, subgroups, turns, aligned, pdl)
    pointers = (dtype, torch.int32 if ordered else None, torch.int32, torch.int32)
    run = prepare(digits_kernel, device, pointers, names, num_warps=1, launch_pdl=pdl)

    def launch(
        steps: int, M: int, stream: int, x: int, order: int | None, digits: int, sums: int, K: int, stride_xm: int
    ) -> None:
        run(-(-steps // names["STEPS"]), M, stream, x, order, digits, sums, K, steps, stride_xm)

    return launch


def constants(
    bf16: bool, ordered: bool, tiles: int, rows: int, subgroups: int, turns: int, pairs: bool, pdl: bool,
    ptx: bool = True,
) -> dict:  # fmt: skip
    """The constexpr arguments of the kernel; without ``ptx`` in portable form, for Triton's interpreter."""
    largest, digits = (largest_asm(bf16), digits_asm(bf16)) if ptx else ((None, None), (None, None))
    return {
        "TILES": tiles, "ROWS": rows, "SUBGROUPS": subgroups, "TURNS": turns, "PAIRS": pairs,
        "STEPS": 1 if ordered else 2,  # columns from anywhere take longer, and more warps at once
        "LARGEST": largest[0], "LARGEST_CONSTRAINTS": largest[1], "DIGITS": digits[0], "DIGITS_CONSTRAINTS": digits[1],
        "PDL": pdl,
    }  # fmt: skip
