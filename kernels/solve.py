"""One block of columns of GPTQ, rounded one after another, each error moved onto the columns of the block that follow.

    q[j] = scale * (code[j] - zero)        w[i] -= F[j, i] (w[j] - q[j]) for i > j in the block
    change[j] = columns[j] - q[j]          w[j] being columns[j] and what was moved onto it
    loss += cost[j] (w[j] - q[j])^2

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


@triton.jit(do_not_specialize=["first", "count", "maxq", "N"])
def solve_kernel(
    tile_ptr,
    columns_ptr,
    change_ptr,
    spread_ptr,
    groups_ptr,
    runs_ptr,
    positions_ptr,
    cost_ptr,
    scales_ptr,
    zeros_ptr,
    codes_ptr,
    loss_ptr,
    first,
    count,
    maxq,
    N,
    FIND: tl.constexpr,
    SYM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUB: tl.constexpr,
):
    """BLOCK_N rows of the weight a program, and every column of the block, which it has in parts of SUB.

    A column waits for those before it: for a comparison, a select and a sum of each value of its part, which pick it
    out of the registers, for a division, and for the update of its part. Updates of later parts fill the time. What
    comes from memory is asked for a column ahead, or with its part; what is stored waits for the part's end.
    """
    # Which rows are mine
    PARTS: tl.constexpr = BLOCK_K // SUB
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, SUB)
    mask_n = offs_n < N
    last = count - 1

    # Load the block, and what the first step needs
    parts = ()
    for s in tl.static_range(PARTS):
        offs_k = s * SUB + offs_s
        ptrs = tile_ptr + offs_k.to(tl.int64)[:, None] * N + offs_n[None, :]
        parts = parts + (tl.load(ptrs, mask=(offs_k < count)[:, None] & mask_n[None, :], other=0.0),)
    group = tl.load(groups_ptr + first).to(tl.int64)  # it may have started in the block before
    scale = tl.load(scales_ptr + group * N + offs_n, mask=mask_n, other=1.0).to(tl.float32)
    zero = tl.load(zeros_ptr + group * N + offs_n, mask=mask_n, other=0.0)
    if FIND:
        run = tl.load(runs_ptr + first)
    else:
        group = tl.load(groups_ptr + first + tl.minimum(1, last)).to(tl.int64)
    row_ptrs = spread_ptr + offs_s[:, None] + tl.zeros([1, BLOCK_N], tl.int32)
    offs = offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
    loss = tl.load(loss_ptr + offs_n, mask=mask_n, other=0.0)

    # Walk the columns
    for s in tl.static_range(PARTS):
        offs_k = s * SUB + offs_s
        mask_k = offs_k < count
        mask = mask_k[:, None] & mask_n[None, :]
        originals = tl.load(columns_ptr + offs, mask=mask, other=0.0)
        positions = tl.load(positions_ptr + first + offs_k, mask=mask_k, other=0).to(tl.int64)
        codes, values = tl.zeros_like(originals), tl.zeros_like(originals)
        for own_j in range(tl.minimum(count - s * SUB, SUB)):
            j = s * SUB + own_j
            mine = (offs_s == own_j)[:, None]
            cost, rows = tl.load(cost_ptr + first + j), ()
            for p in tl.static_range(PARTS - s):
                rows = rows + (tl.load(row_ptrs + (j * BLOCK_K + (s + p) * SUB)),)
            if FIND:
                if run > 0:
                    low, high = tl.zeros_like(zero), tl.zeros_like(zero)  # a range holds 0 in any case
                    for p in tl.static_range(PARTS - s):
                        at = (s + p) * SUB + offs_s
                        members = tl.where(((at >= j) & (at < j + run))[:, None], parts[p], 0.0)
                        low, high = tl.minimum(low, tl.min(members, axis=0)), tl.maximum(high, tl.max(members, axis=0))
                    scale, zero = grid_of(  # pyright: ignore[reportGeneralTypeIssues]
                        low, high, maxq, scales_ptr.dtype.element_ty, SYM
                    )
                    group = tl.load(groups_ptr + first + j).to(tl.int64)
                    tl.store(scales_ptr + group * N + offs_n, scale.to(scales_ptr.dtype.element_ty), mask=mask_n)
                    tl.store(zeros_ptr + group * N + offs_n, zero, mask=mask_n)
                run = tl.load(runs_ptr + first + tl.minimum(j + 1, last))
                next_scale, next_zero = scale, zero
            else:
                next_scale = tl.load(scales_ptr + group * N + offs_n, mask=mask_n, other=1.0).to(tl.float32)
                next_zero = tl.load(zeros_ptr + group * N + offs_n, mask=mask_n, other=0.0)
                group = tl.load(groups_ptr + first + tl.minimum(j + 2, last)).to(tl.int64)
            column = tl.sum(tl.where(mine, parts[0], 0.0), axis=0)
            steps = tl.minimum(tl.maximum(tl.div_rn(column, scale), -1024.0), 1024.0)  # beyond any code: same code
            code = tl.minimum(tl.maximum(to_nearest(steps) + zero, 0.0), maxq.to(tl.float32))
            value = (code - zero) * scale
            miss = column - value
            moved = ()
            for p in tl.static_range(PARTS - s):  # columns up to this one, and beyond the last, hold anything from now
                moved = moved + (parts[p] - rows[p] * miss[None, :],)
            parts = moved
            loss += miss * miss * cost
            codes, values = tl.where(mine, code[None, :], codes), tl.where(mine, value[None, :], values)
            scale, zero = next_scale, next_zero
        tl.store(codes_ptr + positions[:, None] * N + offs_n[None, :], codes.to(tl.uint8), mask=mask)
        tl.store(change_ptr + offs, originals - values, mask=mask)
        offs += SUB * N
        parts = parts[1:]
    tl.store(loss_ptr + offs_n, loss, mask=mask_n)


def solve(
    tile: Tensor,
    columns: Tensor,
    change: Tensor,
    spread: Tensor,
    groups: Tensor,
    runs: Tensor | None,
    positions: Tensor,
    cost: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    loss: Tensor,
    *,
    first: int,
    maxq: int,
    sym: bool,
    block_n: int = 8,
    num_warps: int = 1,
) -> None:
    """Launch on the current stream of the tile's device; all matrices are contiguous.

    Args:
        tile: float32 (count, N), 1 to BLOCK_K columns of the block in processing order, errors of those before it
            already moved onto them.
        columns: The same as they were, float32 (count, N).
        change: How much less their codes stand for, float32 (count, N), overwritten.
        spread: float32 (BLOCK_K, BLOCK_K), contiguous, of which (count, count) above the diagonal matters.
        groups: int32 (K,), each column's group.
        runs: int32 (K,), where a group starts that is found here: its columns, all in this block; elsewhere 0.
            None: every group is given.
        positions: int32 (K,), the row of codes that a column writes.
        cost: Of an error in each column, float32 (K,).
        scales: (G, N), floating; found groups are overwritten. A scale beyond its dtype is stored as infinity.
        zeros: float32 (G, N); found groups are overwritten.
        codes: uint8 (K, N), overwritten at positions.
        loss: float32 (N,), to which what errors cost is added.
        first: First column of the block.
        maxq: Largest code.
        sym: Whether zero points that are found are (maxq + 1) / 2.
        block_n: Rows of the weight a program, a power of two.
        num_warps: Warps per program.
    """
    count, N = tile.shape
    pointers = tile, columns, change, spread, groups, runs, positions, cost, scales, zeros, codes, loss
    constants = {
        "FIND": runs is not None, "SYM": sym, "BLOCK_K": BLOCK_K, "BLOCK_N": block_n, "SUB": SUB,
    }  # fmt: skip
    integers = first, count, maxq, N
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    run(solve_kernel, (triton.cdiv(N, block_n), 1), pointers, integers, constants, **options)


BLOCK_K = 128  # columns of the longest block
SUB = 16  # of a part

_POINTERS = {
    "tile_ptr": "fp32",
    "columns_ptr": "fp32",
    "change_ptr": "fp32",
    "spread_ptr": "fp32",
    "groups_ptr": "i32",
    "runs_ptr": "i32",
    "positions_ptr": "i32",
    "cost_ptr": "fp32",
    "scales_ptr": "x",
    "zeros_ptr": "fp32",
    "codes_ptr": "u8",
    "loss_ptr": "fp32",
}
# What CI compiles ahead of time: types of pointers ("x" is the dtype of scales) and constants
VARIANTS = tuple(
    {"kernel": solve_kernel, **_POINTERS, "FIND": find, "SYM": sym, "BLOCK_K": BLOCK_K, "SUB": SUB}
    for find, sym in ((True, False), (True, True), (False, False))
)
# Rows a program and warps: the launcher's default
TILES = ((8, 1),)
