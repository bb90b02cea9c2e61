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

from .launch import Launch, prepare


@triton.jit
def units(largest):
    """By the bits of the largest float32, without its sign: one divided by the unit, and the unit."""
    # 32639 = 127 * 256 + 127 is the largest number of two signed digits
    exponent = ((largest.to(tl.float32, bitcast=True) * (32768 / 32639)).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -110)
    unit = tl.where(largest < 0x7F800000, ((113 + exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    return ((141 - exponent) << 23).to(tl.float32, bitcast=True), unit


@triton.jit(do_not_specialize=["K", "stride_xm"], do_not_specialize_on_alignment=["x_ptr"])
def digits_kernel(
    x_ptr,
    order_ptr,
    digits_ptr,
    sums_ptr,
    K,
    stride_xm,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    SUBGROUPS: tl.constexpr,
    TURNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A step of a row of x a program."""
    if PDL:
        gdc_launch_dependents()  # the product, which waits for this kernel
    step = tl.program_id(0)
    m = tl.program_id(1)

    # Load
    offs = step * 128 + tl.arange(0, 128)
    if order_ptr is not None:
        offs = tl.load(order_ptr + offs)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + m.to(tl.int64) * stride_xm + offs, mask=(offs >= 0) & (offs < K), other=0).to(tl.float32)

    # To integers of at most 15 bits and a sign, to nearest, by the addition's rounding
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)  # the order of floats, NaN and infinity above all
    per_unit, unit = units(largest)
    integers = (x * per_unit + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000

    # Digits, four to a word: column 32 s + 16 hb + 8 i1 + 2 t + i0 is byte 2 i0 + i1 of word (s, hb) of lane 4 n + t
    q = tl.reshape(integers, (8, 2, 4, 2))
    byte = 16 * tl.arange(0, 2)[None, None, None, :] + 8 * tl.arange(0, 2)[None, :, None, None]
    high = (q + 128) >> 8
    high_words = tl.sum(tl.sum((high & 255) << byte, 3), 1)  # ((s, hb), t)
    low_words = tl.sum(tl.sum((q & 255) << byte, 3), 1)

    # Store
    word = tl.arange(0, 8)[:, None]
    t = tl.arange(0, 4)[None, :]
    if ROWS == 0:
        # for decode.py: tiles of eight columns n = 2 (SUBGROUPS m + u) + digit, 0 outside of subgroup u; words
        # [s // 2][lane 4 n + t][s % 2][hb]
        TILE: tl.constexpr = 4 // SUBGROUPS  # rows of x
        tile = step * TILES + m // TILE
        place = m % TILE * SUBGROUPS  # of the first subgroup
        ptrs = digits_ptr + tile * 256 + word // 4 * 128 + t * 4 + word % 4
        for u in tl.static_range(SUBGROUPS):
            inside = word * SUBGROUPS // 8 == u
            tl.store(ptrs + (place + u) * 32, tl.where(inside, high_words, 0))
            tl.store(ptrs + (place + u) * 32 + 16, tl.where(inside, low_words, 0))
        # SUBGROUPS m + u: unit, sums in turn
        GROUPS: tl.constexpr = SUBGROUPS * TURNS
        sums = -tl.sum(tl.reshape(integers, (GROUPS, 128 // GROUPS)), 1)
        group = tl.arange(0, GROUPS)
        ptrs = sums_ptr + (tile * 4 + place + group // TURNS) * (2 * TURNS)
        tl.store(ptrs, unit.to(tl.int32, bitcast=True))
        tl.store(ptrs + 1 + group % TURNS, sums)
    else:
        # for wide.py: rows 2 m + digit of 128 bytes, words [(s, hb)][t]
        ptrs = digits_ptr + step * (64 * ROWS) + m * 64 + word * 4 + t
        tl.store(ptrs, high_words)
        tl.store(ptrs + 32, low_words)
        # units, then sums; a lane 4 g + t reads all rows 4 j + t at once
        ptr = sums_ptr + step * (2 * ROWS) + m % 4 * (ROWS // 4) + m // 4
        tl.store(ptr, unit.to(tl.int32, bitcast=True))
        tl.store(ptr + ROWS, -tl.sum(integers, 0))


def prepare_digits(
    device: int, dtype: torch.dtype, *, ordered: bool, subgroups: int, turns: int, tiles: int, rows: int, pdl: bool
) -> Launch:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of x: float16 or bfloat16.
        ordered: Whether there is an order.
        subgroups: For decode.py: groups of a step with columns of their own, 1, 2 or 4; else 1.
        turns: For decode.py: groups of a step that share columns, 1, 2 or 4; else 1.
        tiles: For decode.py: tiles of 4 / subgroups rows of x; else 0.
        rows: For wide.py: rows of x in a block; else 0.
        pdl: Programmatic dependent launch (sm_90 on).

    Returns:
        ``launch(steps, M, stream, x, order, digits, sums, K, stride_xm)``, which writes what belongs to rows of x:

        - x: (M, K), unit stride along K.
        - order: int32 (steps * 128,), the column of x for each column of the tiles, -1 for 0; or None.
        - digits: for decode.py int32 (steps, tiles, 256); for wide.py (steps, rows, 64).
        - sums: for decode.py int32 (steps, tiles, 4, 2 * turns), for wide.py (steps, 2, rows): the bits of the unit
          and minus the sum of each group.
    """
    constants = {"TILES": tiles, "ROWS": rows, "SUBGROUPS": subgroups, "TURNS": turns, "PDL": pdl}
    pointers = (dtype, torch.int32 if ordered else None, torch.int32, torch.int32)
    return prepare(digits_kernel, device, pointers, 2, constants, num_warps=1, launch_pdl=pdl)
