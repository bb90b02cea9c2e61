"""The best scale and zero point of one group under the Hessian, its codes given: `refinement.refit_scales`'s step.

    target = H (w - q) + scale H steps        loss(s, z) = s^2 t^T H t - 2 s t^T target  with  t = steps + zero - z

`gptq_triton.refinement` runs it where a weight is on a GPU, unless ``SolverOptions.fused`` is off. All arithmetic is
float64: losses are differences of what is larger by orders of magnitude.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import run


@triton.jit
def _row(h_ptrs, codes_ptr, gradient_ptr, row, before_ptrs, mask_r, mask_n):
    """A row of H inside the group, and the codes, gradients and changes of its input."""
    h = tl.load(h_ptrs, mask=mask_r, other=0.0)
    code = tl.load(codes_ptr + row, mask=mask_n, other=0)
    gradient = tl.load(gradient_ptr + row, mask=mask_n, other=0.0)
    return h, code, gradient, tl.load(before_ptrs, mask=mask_n, other=0.0)


@triton.jit(do_not_specialize=["group", "first", "count", "maxq", "N", "stride_h"])
def refit_kernel(
    codes_ptr,
    h_ptr,
    gradient_ptr,
    before_ptr,
    scales_ptr,
    zeros_ptr,
    loss_ptr,
    high_ptr,
    low_ptr,
    units_ptr,
    group,
    first,
    count,
    maxq,
    N,
    stride_h,
    SYM: tl.constexpr,
    LOW_UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_N outputs a program: their codes stay in registers, rows of H pass by, the next one on its way."""
    # Load the group
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < count
    mask = mask_r[:, None] & mask_n[None, :]
    rows = (first + offs_r).to(tl.int64)[:, None] * N + offs_n[None, :]
    here = group.to(tl.int64) * N + offs_n
    scale = tl.load(scales_ptr + here, mask=mask_n, other=1.0).to(tl.float64)
    zero = tl.load(zeros_ptr + here, mask=mask_n, other=0.0).to(tl.float64)
    steps = tl.load(codes_ptr + rows, mask=mask, other=0).to(tl.float64) - zero[None, :]
    steps = tl.where(mask, steps, 0.0)

    # Sums over the group: 1 is a step of one for every row
    square = tl.zeros((BLOCK_N,), tl.float64)  # steps H steps
    mixed = tl.zeros((BLOCK_N,), tl.float64)  # 1 H steps
    product = tl.zeros((BLOCK_N,), tl.float64)  # steps target
    plain = tl.zeros((BLOCK_N,), tl.float64)  # 1 target
    ones = scale * 0.0  # 1 H 1
    h_ptrs = h_ptr + first.to(tl.int64) * (stride_h + 1) + offs_r
    row, before_ptrs = first.to(tl.int64) * N + offs_n, before_ptr + offs_n
    ahead = _row(h_ptrs, codes_ptr, gradient_ptr, row, before_ptrs, mask_r, mask_n)
    for r in range(count):
        h, own, gradient, before = ahead
        h_ptrs += stride_h
        row += N
        before_ptrs += N
        more = r + 1 < count
        ahead = _row(h_ptrs, codes_ptr, gradient_ptr, row, before_ptrs, mask_r & more, mask_n & more)
        own, gradient = own.to(tl.float64) - zero, gradient.to(tl.float64) - before.to(tl.float64)
        h = h.to(tl.float64)
        moved = tl.sum(h[:, None] * steps, axis=0)
        target = gradient + scale * moved
        square += own * moved
        mixed += moved
        product += own * target
        plain += target
        ones += tl.sum(h, axis=0)

    # The best of all zero points, each with its best scale; the first of equals
    dtype: tl.constexpr = scales_ptr.dtype.element_ty
    tiny: tl.constexpr = 6.103515625e-05 if dtype == tl.float16 else 1.1754943508222875e-38
    most: tl.constexpr = 65504.0 if dtype == tl.float16 else 3.3895313892515355e38
    old = scale * scale * square - 2.0 * scale * product
    best = tl.full((BLOCK_N,), float("inf"), tl.float64)
    best_scale, best_zero = scale, zero
    for i in range(1 if SYM else maxq + 1):
        candidate = zero if SYM else zero * 0.0 + i
        shift = candidate - zero
        squared = square - 2.0 * shift * mixed + shift * shift * ones
        along = product - shift * plain
        ideal = along / squared
        stored = ideal.to(tl.float32).to(dtype).to(tl.float64)
        valid = (squared > 0) & (ideal >= tiny) & (ideal <= most)
        loss = stored * stored * squared - 2.0 * stored * along
        better = valid & (loss < best)
        best = tl.where(better, loss, best)
        best_scale, best_zero = tl.where(better, stored, best_scale), tl.where(better, candidate, best_zero)
    better = best < old
    best_scale, best_zero = tl.where(better, best_scale, scale), tl.where(better, best_zero, zero)

    # Store it, and what it changes, in halves
    tl.store(scales_ptr + here, best_scale.to(tl.float32).to(dtype), mask=mask_n)
    tl.store(zeros_ptr + here, best_zero.to(tl.float32), mask=mask_n)
    loss = tl.load(loss_ptr + offs_n, mask=mask_n, other=0.0)
    tl.store(loss_ptr + offs_n, loss + tl.where(better, best - old, 0.0), mask=mask_n)
    change = (steps + (zero - best_zero)[None, :]) * best_scale[None, :] - steps * scale[None, :]
    unit = tl.load(units_ptr + offs_n, mask=mask_n, other=1.0)
    scaled = change.to(tl.float32) / unit[None, :]
    high = scaled.to(tl.float16)
    tl.store(high_ptr + rows, high, mask=mask)
    tl.store(low_ptr + rows, ((scaled - high.to(tl.float32)) * LOW_UNIT).to(tl.float16), mask=mask)


def refit(
    codes: Tensor,
    H: Tensor,
    gradient: Tensor,
    before: Tensor,
    scales: Tensor,
    zeros: Tensor,
    loss: Tensor,
    high: Tensor,
    low: Tensor,
    units: Tensor,
    *,
    group: int,
    first: int,
    count: int,
    maxq: int,
    sym: bool,
    low_unit: float,
    block_n: int = 4,
    num_warps: int = 1,
) -> None:
    """Launch on the current stream of the codes' device; all matrices are contiguous.

    Args:
        codes: uint8 (K, N), a group's rows together.
        H: float32 (K, K), symmetric.
        gradient: ``H (w - q)`` as all groups were before, float32 (K, N).
        before: What the changes of the groups before take off it, float32 (count, N).
        scales: 16 bits or float32 (G, N), > 0; the group's are overwritten.
        zeros: float32 (G, N); the group's are overwritten.
        loss: Of each output, float64 (N,); what the group gains is taken off.
        high, low: float16 (K, N): how much ``q`` rises is ``(high + low / low_unit) * units``; the group's rows are
            overwritten.
        units: Powers of two, float32 (N,).
        group: Its index.
        first: Its first row.
        count: Its rows, at most BLOCK_R.
        maxq: Largest code.
        sym: Whether zero points stay.
        low_unit: What lower halves are multiplied by.
        block_n: Outputs of a program, a power of two.
        num_warps: Warps per program.
    """
    N = codes.shape[1]
    pointers = codes, H, gradient, before, scales, zeros, loss, high, low, units
    constants = {
        "SYM": sym, "LOW_UNIT": low_unit, "BLOCK_R": BLOCK_R, "BLOCK_N": block_n,
    }  # fmt: skip
    integers = group, first, count, maxq, N, H.stride(0)
    run(refit_kernel, (triton.cdiv(N, block_n), 1), pointers, integers, constants, num_warps=num_warps)


BLOCK_R = 128  # rows of the longest group

_POINTERS = {
    "codes_ptr": "u8",
    "h_ptr": "fp32",
    "gradient_ptr": "fp32",
    "before_ptr": "fp32",
    "scales_ptr": "x",
    "zeros_ptr": "fp32",
    "loss_ptr": "fp64",
    "high_ptr": "fp16",
    "low_ptr": "fp16",
    "units_ptr": "fp32",
}
# What CI compiles ahead of time: types of pointers ("x" is the dtype of scales) and constants
VARIANTS = tuple(
    {"kernel": refit_kernel, **_POINTERS, "SYM": sym, "LOW_UNIT": 2048.0, "BLOCK_R": BLOCK_R} for sym in (True, False)
)
# Outputs of a program and warps: the launcher's default
TILES = ((4, 1),)
