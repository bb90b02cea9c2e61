"""The range of each group of weights, shrunk where that lowers its rounding error: every candidate in one launch.

`gptq_triton.walk` and `solver` run it where a weight is on a GPU, unless ``SolverOptions.fused`` is off; elsewhere
`refinement.clipped_params`, or with ``mse`` `quantizer.group_params`, does the same in PyTorch. Scales and
zero points of a candidate are the same to the bit; the sums that choose between candidates are added in another order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import run
from .solve import as_stored, grid_of, to_nearest


@triton.jit(
    do_not_specialize=["total", "length", "maxq", "N", "candidates"],
    do_not_specialize_on_alignment=["cost_ptr", "scales_ptr", "zeros_ptr"],
)
def clip_kernel(
    rows_ptr,
    cost_ptr,
    keep_ptr,
    scales_ptr,
    zeros_ptr,
    total,
    length,
    maxq,
    N,
    candidates,
    SYM: tl.constexpr,
    SHORT: tl.constexpr,
    POWER: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N outputs of one group a program; a SHORT group stays in registers."""
    group = tl.program_id(1)
    first = group.to(tl.int64) * length
    count = tl.minimum(total - group * length, length)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N

    # The whole range, 0 inside
    columns_ptr = rows_ptr + offs_n[None, :]
    offs_k = first + offs_r
    rows = tl.load(columns_ptr + offs_k[:, None] * N, mask=(offs_r < count)[:, None] & mask_n[None, :], other=0.0)
    cost = tl.load(cost_ptr + offs_k, mask=offs_r < count, other=0.0)
    low, high = tl.min(rows, axis=0), tl.max(rows, axis=0)
    if not SHORT:
        for start in range(BLOCK_R, count, BLOCK_R):
            mask = (start + offs_r < count)[:, None] & mask_n[None, :]
            more = tl.load(columns_ptr + (offs_k + start)[:, None] * N, mask=mask, other=0.0)
            low, high = tl.minimum(low, tl.min(more, axis=0)), tl.maximum(high, tl.max(more, axis=0))
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    if SYM:
        high = tl.maximum(-low, high)
        low = -high

    # The best candidate, the first of equals
    dtype: tl.constexpr = scales_ptr.dtype.element_ty if STORED else tl.float32
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_scale, best_zero = grid_of(low, high, maxq, dtype, SYM)  # pyright: ignore[reportGeneralTypeIssues]
    for i in range(candidates):
        keep = tl.load(keep_ptr + i)
        scale, zero = grid_of(low * keep, high * keep, maxq, dtype, SYM)  # pyright: ignore[reportGeneralTypeIssues]
        loss = _loss(rows, cost, scale, zero, maxq, POWER)
        if not SHORT:
            for start in range(BLOCK_R, count, BLOCK_R):
                inside = start + offs_r < count
                mask = inside[:, None] & mask_n[None, :]
                more = tl.load(columns_ptr + (offs_k + start)[:, None] * N, mask=mask, other=0.0)
                costs = tl.load(cost_ptr + offs_k + start, mask=inside, other=0.0)
                loss += _loss(more, costs, scale, zero, maxq, POWER)
        loss = loss * _power(scale, POWER)
        better = loss < best
        best = tl.where(better, loss, best)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    offs = group.to(tl.int64) * N + offs_n
    stored = as_stored(best_scale, scales_ptr.dtype.element_ty)
    tl.store(scales_ptr + offs, stored.to(scales_ptr.dtype.element_ty), mask=mask_n)
    tl.store(zeros_ptr + offs, best_zero, mask=mask_n)


@triton.jit
def _power(x, POWER: tl.constexpr):
    """x >= 0 to a power."""
    return x * x if POWER == 2.0 else tl.exp2(POWER * tl.log2(x))


@triton.jit
def _loss(rows, cost, scale, zero, maxq, POWER: tl.constexpr):
    """What a grid costs each output, in steps to that power."""
    steps = tl.div_rn(rows, tl.broadcast_to(scale[None, :], rows.shape))
    near = to_nearest(tl.minimum(tl.maximum(steps, -1024.0), 1024.0))  # beyond any code: same code
    miss = tl.minimum(tl.maximum(near, -zero[None, :]), maxq - zero[None, :]) - steps
    return tl.sum(cost[:, None] * _power(tl.abs(miss), POWER), axis=0)


def clip(
    rows: Tensor,
    cost: Tensor,
    keep: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    length: int,
    maxq: int,
    sym: bool,
    power: float = 2.0,
    stored: bool = True,
    block_n: int = 16,
    num_warps: int = 4,
) -> None:
    """Launch on the current stream of the rows' device; all are contiguous.

    Args:
        rows: float32 (K, N).
        cost: What an error of 1 in each input costs, >= 0, float32 (K,).
        keep: Shares of a group's whole range that are tried, float32.
        scales: 16 bits or float32 (G, N), overwritten; infinite where their dtype cannot hold them.
        zeros: Integral zero points, float32 (G, N), overwritten.
        length: Rows of a group; the last may have fewer.
        maxq: Largest code.
        sym: Zero points are (maxq + 1) / 2.
        power: To which errors count.
        stored: Candidates are compared with their scales as they are stored.
        block_n: Outputs of a program, a power of two.
        num_warps: Warps per program.
    """
    K, N = rows.shape
    constants = {
        "SYM": sym, "SHORT": min(length, K) <= BLOCK_R, "POWER": float(power), "STORED": stored,
        "BLOCK_R": BLOCK_R, "BLOCK_N": block_n,
    }  # fmt: skip
    pointers, integers = (rows, cost, keep, scales, zeros), (K, length, maxq, N, len(keep))
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    run(clip_kernel, (triton.cdiv(N, block_n), triton.cdiv(K, length)), pointers, integers, constants, **options)


BLOCK_R = 128  # rows that a program keeps

_POINTERS = {"rows_ptr": "fp32", "cost_ptr": "fp32", "keep_ptr": "fp32", "scales_ptr": "x", "zeros_ptr": "fp32"}
# What CI compiles ahead of time: types of pointers ("x" is the dtype of scales) and constants
VARIANTS = tuple(
    {
        "kernel": clip_kernel,
        **_POINTERS,
        "SYM": sym,
        "SHORT": short,
        "POWER": power,
        "STORED": power == 2,
        "BLOCK_R": BLOCK_R,
    }
    for sym, short, power in ((True, True, 2.0), (False, True, 2.0), (False, False, 2.0), (False, True, 2.4))
)
# Outputs of a program and warps: the launcher's default
TILES = ((16, 4),)
