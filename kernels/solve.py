"""One block of columns of GPTQ, rounded one after another, each error moved onto the columns of the block that follow.

    q[j] = scale * (code[j] - zero)        w[i] -= F[j, i] (w[j] - q[j]) for i > j in the block

`gptq_triton.walk` runs it where a weight is on a GPU, unless ``SolverOptions.fused`` is off; columns after the block
are its caller's. Rows of a weight do not interact, so a program keeps some of them. Every operation is rounded as the
eager loop rounds it: codes are the same, bit for bit.
Source: Frantar et al., "GPTQ" (2022), algorithm 1, its inner loop.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import run


@triton.jit
def to_nearest(x):
    """To the nearest integer, ties to even, for abs(x) < 2^22: there 1.5 * 2^23 leaves no fraction bit."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def as_stored(scale, dtype: tl.constexpr):
    """A float32 scale as the dtype that stores it holds it, never below its smallest normal number."""
    tiny: tl.constexpr = 6.103515625e-05 if dtype == tl.float16 else 1.1754943508222875e-38
    return tl.maximum(scale.to(dtype).to(tl.float32), tiny)


@triton.jit
def grid_of(low, high, maxq, dtype: tl.constexpr, SYM: tl.constexpr):
    """Scale, rounded to the dtype that stores it, and zero point for low <= 0 <= high, as the quantizer finds them."""
    if SYM:
        high = tl.maximum(-low, high)
        low = -high
    unused = high == low
    low = tl.where(unused, -1.0, low)
    high = tl.where(unused, 1.0, high)
    exact = tl.maximum(tl.div_rn(high - low, tl.zeros_like(low) + maxq), 1.1754943508222875e-38)  # float32's tiny
    if SYM:
        zero = tl.zeros_like(low) + (maxq + 1) // 2
    else:
        zero = to_nearest(tl.div_rn(-low, exact))
    return as_stored(exact, dtype), zero


@triton.jit(
    do_not_specialize=["first", "count", "maxq", "N", "stride_spread"], do_not_specialize_on_alignment=["spread_ptr"]
)
def solve_kernel(
    tile_ptr,
    spread_ptr,
    groups_ptr,
    runs_ptr,
    positions_ptr,
    scales_ptr,
    zeros_ptr,
    codes_ptr,
    first,
    count,
    maxq,
    N,
    stride_spread,
    FIND: tl.constexpr,
    SYM: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N rows of the weight a program, and every column of the block.

    A column costs about five instructions for each value of the tile: a comparison, a select and a sum pick it out of
    the registers, a product and a difference update what follows. Unrolling would save the first three for 128 copies
    of the loop.
    """
    # Which rows are mine
    if ALIGNED:
        N = tl.multiple_of(N, 16)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < count

    # Load the block, and what the first step needs
    tile_ptrs = tile_ptr + offs_k.to(tl.int64)[:, None] * N + offs_n[None, :]
    tile = tl.load(tile_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
    group = tl.load(groups_ptr + first).to(tl.int64)  # it may have started in the block before
    scale = tl.load(scales_ptr + group * N + offs_n, mask=mask_n, other=1.0).to(tl.float32)
    zero = tl.load(zeros_ptr + group * N + offs_n, mask=mask_n, other=0.0)
    row_ptr = spread_ptr
    row = tl.load(row_ptr + offs_k, mask=mask_k & (offs_k > 0), other=0.0)
    values_ptrs = tile_ptr + offs_n

    # Walk the columns
    for j in range(count):
        # a row of the inverse ahead: its way from memory hides behind this column
        row_ptr += stride_spread
        next_row = tl.load(row_ptr + offs_k, mask=mask_k & (offs_k > j + 1) & (j + 1 < count), other=0.0)
        group = tl.load(groups_ptr + first + j).to(tl.int64)
        position = tl.load(positions_ptr + first + j).to(tl.int64)
        if FIND:
            run = tl.load(runs_ptr + first + j)
            if run > 0:
                inside = (offs_k >= j) & (offs_k < j + run)
                members = tl.where(inside[:, None], tile, 0.0)  # a range holds 0 in any case
                low, high = tl.min(members, axis=0), tl.max(members, axis=0)
                scale, zero = grid_of(  # pyright: ignore[reportGeneralTypeIssues]
                    low, high, maxq, scales_ptr.dtype.element_ty, SYM
                )
                tl.store(scales_ptr + group * N + offs_n, scale.to(scales_ptr.dtype.element_ty), mask=mask_n)
                tl.store(zeros_ptr + group * N + offs_n, zero, mask=mask_n)
        else:
            scale = tl.load(scales_ptr + group * N + offs_n, mask=mask_n, other=1.0).to(tl.float32)
            zero = tl.load(zeros_ptr + group * N + offs_n, mask=mask_n, other=0.0)
        column = tl.sum(tl.where((offs_k == j)[:, None], tile, 0.0), axis=0)
        steps = tl.minimum(tl.maximum(tl.div_rn(column, scale), -1024.0), 1024.0)  # beyond any code: same code
        code = tl.minimum(tl.maximum(to_nearest(steps) + zero, 0.0), maxq.to(tl.float32))
        value = (code - zero) * scale
        miss = column - value
        tile -= row[:, None] * miss[None, :]
        tl.store(codes_ptr + position * N + offs_n, code.to(tl.uint8), mask=mask_n)
        tl.store(values_ptrs, value, mask=mask_n)
        values_ptrs += N
        row = next_row


def solve(
    tile: Tensor,
    spread: Tensor,
    groups: Tensor,
    runs: Tensor | None,
    positions: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    *,
    first: int,
    maxq: int,
    sym: bool,
    block_n: int = 8,
    num_warps: int = 1,
) -> None:
    """Launch on the current stream of the tile's device; all matrices but spread are contiguous.

    Args:
        tile: float32 (count, N), 1 to BLOCK_K columns of the block in processing order, errors of those before it
            already moved onto them; overwritten by what their codes stand for.
        spread: float32 (count, count), upper, unit stride along its rows, with ones on the diagonal; neither these
            nor what lies below is read.
        groups: int32 (K,), each column's group.
        runs: int32 (K,), where a group starts that is found here: its columns, all in this block; elsewhere 0.
            None: every group is given.
        positions: int32 (K,), the row of codes that a column writes.
        scales: (G, N), floating; found groups are overwritten. A scale beyond its dtype is stored as infinity.
        zeros: float32 (G, N); found groups are overwritten.
        codes: uint8 (K, N), overwritten at positions.
        first: First column of the block.
        maxq: Largest code.
        sym: Whether zero points that are found are (maxq + 1) / 2.
        block_n: Rows of the weight a program, a power of two.
        num_warps: Warps per program.
    """
    count, N = tile.shape
    pointers = tile, spread, groups, runs, positions, scales, zeros, codes
    constants = {
        "FIND": runs is not None, "SYM": sym, "ALIGNED": N % 16 == 0, "BLOCK_K": BLOCK_K, "BLOCK_N": block_n,
    }  # fmt: skip
    integers = first, count, maxq, N, spread.stride(0)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    run(solve_kernel, (triton.cdiv(N, block_n), 1), pointers, integers, constants, **options)


BLOCK_K = 128  # columns of the longest block

_POINTERS = {
    "tile_ptr": "fp32",
    "spread_ptr": "fp32",
    "groups_ptr": "i32",
    "runs_ptr": "i32",
    "positions_ptr": "i32",
    "scales_ptr": "x",
    "zeros_ptr": "fp32",
    "codes_ptr": "u8",
}
# What CI compiles ahead of time: types of pointers ("x" is the dtype of scales) and constants
VARIANTS = tuple(
    {"kernel": solve_kernel, **_POINTERS, "FIND": find, "SYM": sym, "ALIGNED": sym, "BLOCK_K": BLOCK_K}
    for find, sym in ((True, False), (True, True), (False, False))
)
# Rows a program and warps: the launcher's default, and what else may be tried
TILES = ((8, 1), (16, 1), (32, 4))
