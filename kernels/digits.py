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

from .gather import in_order, numbers_of_row
from .launch import Launch, prepare

STEPS = 2  # of a program
STEPS_IN_ORDER = 16  # of one that has a whole row of x in shared memory, where any order is read alike


def blocking(K: int, ordered: bool) -> tuple[int, int]:
    """Steps of a program, and how many numbers of x, which have 16 bits, it has in shared memory for them."""
    numbers = numbers_of_row(K, 2) if ordered else 0
    return STEPS_IN_ORDER if numbers else STEPS, numbers


@triton.jit
def split_digits(x):
    """float32 (R, 128) to int32 (R, 128) of at most 15 bits and a sign, and their units, float32 (R,)."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)  # the order of floats, NaN and infinity above all
    # 32639 = 127 * 256 + 127 is the largest number of two signed digits
    exponent = ((largest.to(tl.float32, bitcast=True) * (32768 / 32639)).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, -110)
    scaled = x * ((141 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]
    integers = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000  # to nearest, by the addition's rounding
    unit = tl.where(largest < 0x7F800000, ((113 + exponent) << 23).to(tl.float32, bitcast=True), float("nan"))
    return integers, unit


@triton.jit(do_not_specialize=["M", "K", "steps", "stride_xm"], do_not_specialize_on_alignment=["x_ptr"])
def digits_kernel(
    x_ptr,
    order_ptr,
    digits_ptr,
    sums_ptr,
    M,
    K,
    steps,
    stride_xm,
    ALIGNED: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    SUBGROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK steps of one row of x a program."""
    if PDL:
        gdc_launch_dependents()  # the product, which waits for this kernel
    # Which steps are mine
    m = tl.program_id(1)
    step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = step < steps

    # The columns of these steps
    offs = step[:, None] * 128 + tl.arange(0, 128)[None, :]
    if order_ptr is not None:
        offs = tl.load(order_ptr + offs, mask=mask[:, None], other=-1)
    x_ptr += m.to(tl.int64) * stride_xm
    if PDL:
        gdc_wait()
    if NUMBERS > 0:
        if ALIGNED:  # the same, and Triton knows what divides it
            x_ptr, K = tl.multiple_of(x_ptr, 16), K // 8 * 8
        x = tl.reshape(in_order(x_ptr, tl.reshape(offs, (BLOCK * 128,)), K, NUMBERS), (BLOCK, 128))
    else:
        x = tl.load(x_ptr + offs, mask=(offs >= 0) & (offs < K) & mask[:, None], other=0)
    integers, unit = split_digits(x.to(tl.float32))

    # Digits, four to a word: column 32 s + 16 hb + 8 i1 + 2 t + i0 is byte 2 i0 + i1 of word (s, hb) of lane 4 n + t
    q = tl.reshape(integers, (BLOCK, 8, 2, 4, 2))
    byte = 16 * tl.arange(0, 2)[None, None, None, None, :] + 8 * tl.arange(0, 2)[None, None, :, None, None]
    high = (q + 128) >> 8
    high_words = tl.sum(tl.sum((high & 255) << byte, 4), 2)  # (BLOCK, (s, hb), t)
    low_words = tl.sum(tl.sum((q & 255) << byte, 4), 2)

    # Store
    word = tl.arange(0, 8)[None, :, None]
    t = tl.arange(0, 4)[None, None, :]
    units = unit.to(tl.int32, bitcast=True)
    if ROWS == 0:
        # for decode.py: tiles of eight columns n = 2 (SUBGROUPS m + u) + digit, 0 outside of subgroup u; words
        # [s // 2][lane 4 n + t][s % 2][hb]
        TILE: tl.constexpr = 4 // SUBGROUPS  # rows of x
        tile = step * TILES + m // TILE
        ptrs = digits_ptr + tile[:, None, None] * 256 + word // 4 * 128 + t * 4 + word % 4
        for u in tl.static_range(SUBGROUPS):
            inside = word * SUBGROUPS // 8 == u
            place = (m % TILE * SUBGROUPS + u) * 32
            tl.store(ptrs + place, tl.where(inside, high_words, 0), mask=mask[:, None, None])
            tl.store(ptrs + place + 16, tl.where(inside, low_words, 0), mask=mask[:, None, None])
        # unit and sum for every lane 4 g + SUBGROUPS m + u
        sums = -tl.sum(tl.reshape(integers, (BLOCK, SUBGROUPS, 128 // SUBGROUPS)), 2)
        lane = 4 * tl.arange(0, 8)[None, :, None] + m % TILE * SUBGROUPS + tl.arange(0, SUBGROUPS)[None, None, :]
        ptrs = sums_ptr + (tile[:, None, None] * 32 + lane) * 2
        tl.store(ptrs, tl.broadcast_to(units[:, None, None], ptrs.shape), mask=mask[:, None, None])
        tl.store(ptrs + 1, tl.broadcast_to(sums[:, None, :], ptrs.shape), mask=mask[:, None, None])
    else:
        # for wide.py: rows n = 2 m + digit of 128 bytes, 16-byte pieces (s, hb) swizzled as in shared memory
        n = 2 * m
        ptrs = digits_ptr + step[:, None, None] * (64 * ROWS) + t
        tl.store(ptrs + n * 32 + (word ^ n % 8) * 4, high_words, mask=mask[:, None, None])
        tl.store(ptrs + (n + 1) * 32 + (word ^ (n + 1) % 8) * 4, low_words, mask=mask[:, None, None])
        # units, then sums; a lane 4 g + t reads all rows 4 j + t at once
        ptrs = sums_ptr + step * (2 * ROWS) + m % 4 * (ROWS // 4) + m // 4
        tl.store(ptrs, units, mask=mask)
        tl.store(ptrs + ROWS, -tl.sum(integers, 1), mask=mask)


def prepare_digits(
    device: int, dtype: torch.dtype, *, K: int, ordered: bool, aligned: bool, subgroups: int, tiles: int, rows: int,
    pdl: bool,
) -> Launch:  # fmt: skip
    """Compile for these constants.

    Args:
        device: Index of the GPU.
        dtype: Of x: float16 or bfloat16.
        K: Columns of x.
        ordered: Whether there is an order.
        aligned: Rows of x start at multiples of 16 bytes.
        subgroups: For decode.py: 1, 2 or 4 to a step; else 1.
        tiles: For decode.py: tiles of 4 / subgroups rows of x; else 0.
        rows: For wide.py: rows of x in a block; else 0.
        pdl: Programmatic dependent launch (sm_90 on).

    Returns:
        ``launch(programs, M, stream, x, order, digits, sums, M, K, steps, stride_xm)``, with enough programs for all
        steps (`blocking`), which writes what belongs to rows of x:

        - x: (M, K), unit stride along K.
        - order: int32 (steps * 128,), the column of x for each column of the tiles, -1 for 0; or None.
        - digits: for decode.py int32 (steps, tiles, 256); for wide.py (steps, rows, 64).
        - sums: for decode.py int32 (steps, tiles, 32, 2), for wide.py (steps, 2, rows): the bits of the unit and minus
          the sum.
    """
    block, numbers = blocking(K, ordered)
    constants = {
        "ALIGNED": numbers > 0 and aligned and K % 8 == 0, "TILES": tiles, "ROWS": rows, "SUBGROUPS": subgroups,
        "BLOCK": block, "NUMBERS": numbers, "PDL": pdl,
    }  # fmt: skip
    pointers = (dtype, torch.int32 if ordered else None, torch.int32, torch.int32)
    return prepare(digits_kernel, device, pointers, 4, constants, num_warps=8 if numbers else 1, launch_pdl=pdl)
