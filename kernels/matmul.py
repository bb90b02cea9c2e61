"""``y = x @ W + bias`` with W in kernel tiles: plain Triton, every width, every GPU.

    y[m, n] = sum over groups g of scales[g, n] * sum over k in g of x[m, k] * (codes[k, n] - zeros[g, n]), + bias[n]

Dispatch picks it for the few rows of x that are too many for a decode kernel, and wherever there is no such kernel.
``code - zero`` is exact, in registers, as the A operand of ``y.T = W.T @ x.T``: wgmma with A in registers on Hopper,
mma elsewhere; on NVIDIA no weight goes back to shared memory. Sums are float32, the scale of a group multiplies its
sum, y is rounded once. Programs that share a tile of y each add a range of steps; the last one to finish sums the
partial sums in their order, so the result is always the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .unpack import by_row, columns32, columns64, columns128, load_fragments, load_meta, load_metas
from .unpack_ptx import unpack_ptx


@triton.jit
def _add(acc, w, scales, x_ptr, offs_x, k, C):
    """acc + scales * (w @ x.T) for the columns from k; those of x from C on are 0."""
    offs_k = k + tl.arange(0, w.shape[1])
    x = tl.load(x_ptr + k + offs_x, mask=(offs_k < C)[None, :], other=0)
    return acc + tl.dot(w, tl.trans(x), input_precision="ieee") * by_row(scales)[:, None]


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,
    words_ptr,
    meta_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    workspace_ptr,
    counters_ptr,
    M,
    N,
    C,
    strips,
    steps,
    groups,
    group_steps,
    stride_xm,
    stride_ym,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_M) tile of y.T, or the part of it that a range of steps adds."""
    # Which tile is mine: neighbours share weights, so these come from L2
    S: tl.constexpr = BLOCK_N // 16
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first_m, first_strip = pid % tiles_m * BLOCK_M, pid // tiles_m * S
    first, last = steps * part // parts, steps * (part + 1) // parts

    # First pointers; rows past M and strips past the last read the last one again, and are not stored
    strip = tl.minimum(tl.arange(0, S), strips - 1 - first_strip)
    words_ptrs = words_ptr + (first_strip.to(tl.int64) * steps + first) * (64 * BITS) + strip * (steps * (64 * BITS))
    offs_meta = (first_strip + strip) * 16
    offs_x = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)[:, None] * stride_xm + tl.arange(0, SPAN)[None, :]
    x_ptr += first_m.to(tl.int64) * stride_xm
    plane, since = (first // group_steps).to(tl.int64) * strips * 16, first % group_steps
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    # The loop over K: a scale for every SPAN columns, whose product with x is summed apart. STAGES is said here, too,
    # so that scales are loaded ahead like what the product takes
    for step in tl.range(first, last, num_stages=STAGES):
        k = step * 128
        if SPAN == 128:
            m0, s0 = load_meta(meta_ptr, scales_ptr, plane + offs_meta, SCALES_BF16)
            f0, f1, f2, f3 = load_fragments(words_ptrs, m0, m0, m0, m0, BITS, ASM, CONSTRAINTS, DTYPE)
            acc = _add(acc, columns128(f0, f1, f2, f3), s0, x_ptr, offs_x, k, C)
            since = tl.where(since + 1 == group_steps, 0, since + 1)
            plane += tl.where(since == 0, strips * 16, 0)
        else:
            m0, m1, m2, m3, s0, s1, s2, s3 = load_metas(
                meta_ptr, scales_ptr, step, groups, group_steps, strips, offs_meta, SPAN, SCALES_BF16
            )
            f0, f1, f2, f3 = load_fragments(words_ptrs, m0, m1, m2, m3, BITS, ASM, CONSTRAINTS, DTYPE)
            if SPAN == 64:
                acc = _add(acc, columns64(f0, f1), s0, x_ptr, offs_x, k, C)
                acc = _add(acc, columns64(f2, f3), s2, x_ptr, offs_x, k + 64, C)
            else:
                acc = _add(acc, columns32(f0), s0, x_ptr, offs_x, k, C)
                acc = _add(acc, columns32(f1), s1, x_ptr, offs_x, k + 32, C)
                acc = _add(acc, columns32(f2), s2, x_ptr, offs_x, k + 64, C)
                acc = _add(acc, columns32(f3), s3, x_ptr, offs_x, k + 96, C)
        words_ptrs += 64 * BITS

    # Epilogue: whoever comes last adds the parts; then the bias, before the only rounding of y
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_strip * 16 + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[None, :] & (offs_n < N)[:, None]
    if workspace_ptr is not None:
        part_ptrs = workspace_ptr + offs_m.to(tl.int64)[None, :] * (strips * 16) + offs_n[:, None]
        stride_part = M.to(tl.int64) * (strips * 16)
        tl.store(part_ptrs + part * stride_part, acc, mask=mask)
        tl.debug_barrier()  # every thread's part is stored before it counts
        is_last = tl.atomic_add(counters_ptr + pid, 1, sem="acq_rel") == parts - 1
        tl.store(counters_ptr + pid, 0, mask=is_last)
        mask &= is_last
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in range(0, tl.where(is_last, parts, 0)):
            acc += tl.load(part_ptrs + i * stride_part, mask=mask, other=0, cache_modifier=".cg")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0).to(tl.float32)[:, None]

    # Store
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * stride_ym + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def matmul(
    x: Tensor,
    words: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    workspace: Tensor | None,
    counters: Tensor | None,
    *,
    bits: int,
    group_columns: int,
    scales_bf16: bool,
    block_m: int,
    block_n: int,
    split: int,
    ptx: bool,
    num_warps: int,
    num_stages: int,
    max_registers: int | None = None,
) -> None:
    """Launch on the current device and stream; y is overwritten.

    Args:
        x: (M, C) float16, bfloat16 or float32, unit stride along C: columns in the order of the tiles, C at most
            128 * steps; the weight's other columns are multiplied by 0.
        words: int32 (strips, steps, 64 * bits), contiguous, as all that follow but y.
        meta: int32 (groups, 16 * strips).
        scales: float32, as meta, or None when meta holds them.
        bias: (N,), floating, or None.
        y: (M, N), the dtype of x, unit stride along N; M at least 1, N from 1 to 16 * strips.
        workspace: float32, split * M * 16 * strips elements; None if split is 1.
        counters: int32, a zero for each tile of y, left zero; None if split is 1. No two launches that may run at the
            same time share it.
        bits: 2, 3, 4 or 8.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
        scales_bf16: Scales in meta are bfloat16, not float16.
        block_m: Rows of x of a tile, a power of two from 16.
        block_n: Columns of y of a tile, a power of two from 64.
        split: Programs that share a tile.
        ptx: Unpack with PTX; NVIDIA from sm_80 only, and not for float32.
        num_warps: Warps per program.
        num_stages: Steps of the loop in flight.
        max_registers: Of a thread, for more programs at a time; NVIDIA only.
    """
    (M, C), N, (strips, steps) = x.shape, y.shape[1], words.shape[:2]
    asm, constraints = unpack_ptx(bits, x.dtype == torch.bfloat16) if ptx else (None, None)
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    matmul_kernel[(triton.cdiv(M, block_m) * triton.cdiv(strips * 16, block_n), split)](
        x_ptr=x,
        words_ptr=words,
        meta_ptr=meta,
        scales_ptr=scales,
        bias_ptr=bias,
        y_ptr=y,
        workspace_ptr=workspace,
        counters_ptr=counters,
        M=M,
        N=N,
        C=C,
        strips=strips,
        steps=steps,
        groups=meta.shape[0],
        group_steps=max(1, group_columns // 128),
        stride_xm=x.stride(0),
        stride_ym=y.stride(0),
        BITS=bits,
        SPAN=min(group_columns, 128),
        SCALES_BF16=scales_bf16,
        ASM=asm,
        CONSTRAINTS=constraints,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=num_stages,
        **options,
    )


# What CI compiles ahead of time: types of pointers ("x" is the dtype of x, None a tensor that is absent) and flags,
# each with every plan (block_m, block_n, num_warps, num_stages, max_registers)
_TYPES = {"kernel": matmul_kernel, "x_ptr": "x", "words_ptr": "i32", "meta_ptr": "i32", "y_ptr": "x"}
_SPLIT = {"workspace_ptr": "fp32", "counters_ptr": "i32"}
_WHOLE = {"workspace_ptr": None, "counters_ptr": None}
VARIANTS = (
    {**_TYPES, **_SPLIT, "scales_ptr": None, "bias_ptr": None, "SPAN": 128},
    {**_TYPES, **_SPLIT, "scales_ptr": "fp32", "bias_ptr": "x", "SPAN": 64},
    {**_TYPES, **_WHOLE, "scales_ptr": None, "bias_ptr": "fp32", "SPAN": 32},
)
HOPPER = ((16, 128, 4, 4, 128), (32, 128, 4, 3, 168), (64, 128, 8, 3, 128))
NVIDIA = ((16, 128, 4, 3, None), (32, 128, 4, 3, None))
AMD = ((16, 64, 4, 2, None), (64, 64, 4, 2, None))
FLOAT = ((16, 32, 4, 2, None),)
