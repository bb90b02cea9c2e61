"""x as integers: two signed digits to the base 256 for each number, one unit for 128 of them. Plain Triton.

    x[m, k] = unit[m, k // 128] * (256 high[m, k] + low[m, k]) + error,   |error| <= unit / 2 < 2**-15 max |x[m, :]| there

The unit is the power of two that makes the largest number of the 128 fill 15 bits, so numbers within a factor of 16 of it
(fp16; bf16: 128) are exact. Digits come in the order in which the decode kernel feeds them to the tensor cores, act-order
applied. Dispatch runs it before the decode kernel. A number that is not finite makes the unit NaN, hence the row of y.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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


@triton.jit(do_not_specialize=["M", "K", "steps"])
def digits_kernel(
    x_ptr,
    order_ptr,
    digits_ptr,
    sums_ptr,
    M,
    K,
    steps,
    stride_xm,
    TILES: tl.constexpr,
    SUBGROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK steps of one row of x a program."""
    if PDL:
        gdc_launch_dependents()
    # Which steps are mine
    m = tl.program_id(1)
    step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = step < steps

    # The columns of these steps
    offs = step[:, None] * 128 + tl.arange(0, 128)[None, :]
    if order_ptr is not None:
        offs = tl.load(order_ptr + offs, mask=mask[:, None], other=-1)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + m.to(tl.int64) * stride_xm + offs, mask=(offs >= 0) & (offs < K) & mask[:, None], other=0)
    integers, unit = split_digits(x.to(tl.float32))

    # Digits, four to a word: column 32 s + 16 hb + 8 i1 + 2 t + i0 is byte 2 i0 + i1 of word (s, hb) of lane 4 n + t
    q = tl.reshape(integers, (BLOCK, 8, 2, 4, 2))
    byte = 16 * tl.arange(0, 2)[None, None, None, None, :] + 8 * tl.arange(0, 2)[None, None, :, None, None]
    high = (q + 128) >> 8
    high_words = tl.sum(tl.sum((high & 255) << byte, 4), 2)  # (BLOCK, (s, hb), t)
    low_words = tl.sum(tl.sum((q & 255) << byte, 4), 2)

    # Store: tiles of four rows of x, which are eight columns n = 2 m + digit; [s // 2][lane][s % 2][hb]
    tile = step * TILES + m // 4
    word = tl.arange(0, 8)[None, :, None]
    lane = 8 * (m % 4) + tl.arange(0, 4)[None, None, :]
    ptrs = digits_ptr + tile[:, None, None] * 256 + word // 4 * 128 + lane * 4 + word % 4
    tl.store(ptrs, high_words, mask=mask[:, None, None])
    tl.store(ptrs + 16, low_words, mask=mask[:, None, None])

    # The unit and the sums of each subgroup, for every lane 4 g + t of row t
    WIDTH: tl.constexpr = 2 * SUBGROUPS
    sums = -tl.sum(tl.reshape(integers, (BLOCK, SUBGROUPS, 128 // SUBGROUPS)), 2)
    lanes = 4 * tl.arange(0, 8)[None, :] + m % 4
    first = sums_ptr + (tile[:, None] * 32 + lanes) * WIDTH
    units = tl.broadcast_to(unit.to(tl.int32, bitcast=True)[:, None], (BLOCK, 8))
    tl.store(first, units, mask=mask[:, None])
    offs_u = 1 + tl.arange(0, SUBGROUPS)
    tl.store(
        first[:, :, None] + offs_u[None, None, :],
        tl.broadcast_to(sums[:, None, :], (BLOCK, 8, SUBGROUPS)),
        mask=mask[:, None, None],
    )


def digits(
    x: Tensor, order: Tensor | None, digits: Tensor, sums: Tensor, *, steps: int, subgroups: int, pdl: bool
) -> None:
    """Launch on the current device and stream; digits and sums are written where rows of x exist.

    Args:
        x: (M, K) float16 or bfloat16, unit stride along K.
        order: int32 (steps * 128,), the column of x for each column of the tiles, -1 for 0; or None.
        digits: int32 (steps, tiles, 256), tiles at least ceil(M / 4).
        sums: int32 (steps, tiles, 32, 2 * subgroups): the bits of the unit, minus the sum of each subgroup.
        steps: Steps of 128 columns.
        subgroups: 1, 2 or 4 to a step.
        pdl: Programmatic dependent launch (sm_90 on).
    """
    M, K = x.shape
    block = 2
    digits_kernel[(triton.cdiv(steps, block), M)](
        x_ptr=x,
        order_ptr=order,
        digits_ptr=digits,
        sums_ptr=sums,
        M=M,
        K=K,
        steps=steps,
        stride_xm=x.stride(0),
        TILES=digits.shape[1],
        SUBGROUPS=subgroups,
        BLOCK=block,
        PDL=pdl,
        num_warps=1,  # pyright: ignore[reportCallIssue] an option of the launch
        launch_pdl=pdl,  # pyright: ignore[reportCallIssue]
    )
