"""W from kernel tiles, for a matrix product that wants it whole: any width, any GPU.

    out[n, k] = scales[g, n] * (codes[k, n] - zeros[g, n])

Dispatch picks it for many rows of x, where an ordinary product is faster than one that unpacks. ``code - zero`` is
exact, its product with the scale is float32, and out is rounded once. A program turns one step of a few strips; what
lies in lanes as tensor cores want it crosses shared memory once, already rounded, to leave in whole rows.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from .unpack import columns128, load_fragments, load_metas
from .unpack_ptx import unpack_ptx


@triton.jit
def _scaled(f, scales, DTYPE: tl.constexpr):
    """A fragment times the scales of its rows, rounded."""
    return (f.to(tl.float32) * scales[:, :, None, None, :, None, None]).to(DTYPE)


@triton.jit
def dequantize_kernel(
    words_ptr,
    meta_ptr,
    scales_ptr,
    out_ptr,
    rows,
    C,
    first_strip,
    strips,
    steps,
    groups,
    group_steps,
    stride_on,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    SCALES_BF16: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    STRIPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One step of STRIPS strips a program."""
    # Which tile is mine: neighbours share rows of out, so these are written in long runs
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    pid = tl.program_id(0)
    tiles_k = tl.cdiv(C, 128)
    step, first = pid % tiles_k, pid // tiles_k * STRIPS

    # Codes - zeros, which float16 holds, and scales; strips past the last read the last one again
    strip = tl.minimum(first_strip + first + tl.arange(0, STRIPS), strips - 1)
    m0, m1, m2, m3, s0, s1, s2, s3 = load_metas(
        meta_ptr, scales_ptr, step, groups, group_steps, strips, strip * 16, SPAN, SCALES_BF16
    )
    words_ptrs = words_ptr + (strip.to(tl.int64) * steps + step) * (64 * BITS)
    f0, f1, f2, f3 = load_fragments(words_ptrs, m0, m1, m2, m3, BITS, ASM, CONSTRAINTS, tl.float16)

    # Weights
    w0, w1, w2, w3 = _scaled(f0, s0, DTYPE), _scaled(f1, s1, DTYPE), _scaled(f2, s2, DTYPE), _scaled(f3, s3, DTYPE)
    w = columns128(w0, w1, w2, w3)

    # Store
    if PDL:
        gdc_wait()  # kernels before may still read what is overwritten; the weight does not depend on them
    offs_n = first * 16 + tl.arange(0, 16 * STRIPS)
    offs_k = step * 128 + tl.arange(0, 128)
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * stride_on + offs_k[None, :]
    tl.store(out_ptrs, w, mask=(offs_n < rows)[:, None] & (offs_k < C)[None, :])


def dequantize(
    words: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    out: Tensor,
    *,
    bits: int,
    group_columns: int,
    scales_bf16: bool,
    first_strip: int = 0,
    ptx: bool,
    pdl: bool = False,
    num_warps: int = 4,
) -> None:
    """Launch on the current device and stream; out is overwritten.

    Args:
        words: int32 (strips, steps, 64 * bits), contiguous, as meta and scales.
        meta: int32 (groups, 16 * strips).
        scales: float32, as meta, or None when meta holds them.
        out: (rows, C) float16, bfloat16 or float32, unit stride along C: the rows from 16 * first_strip on, at least
            one and all of them there; C, in the order of the tiles, from 1 to 128 * steps.
        bits: 2, 3, 4 or 8.
        group_columns: Columns that share a scale: 32, 64 or a multiple of 128.
        scales_bf16: Scales in meta are bfloat16, not float16.
        first_strip: Where out starts.
        ptx: Unpack with PTX; NVIDIA only.
        pdl: Programmatic dependent launch (sm_90 on): the kernel before did not write the weight.
        num_warps: Warps per program, a strip for each.
    """
    (rows, C), steps = out.shape, words.shape[1]
    asm, constraints = unpack_ptx(bits, bf16=False) if ptx else (None, None)
    programs = triton.cdiv(rows, 16 * num_warps) * triton.cdiv(C, 128)
    dequantize_kernel[(programs,)](
        words_ptr=words,
        meta_ptr=meta,
        scales_ptr=scales,
        out_ptr=out,
        rows=rows,
        C=C,
        first_strip=first_strip,
        strips=words.shape[0],
        steps=steps,
        groups=meta.shape[0],
        group_steps=max(1, group_columns // 128),
        stride_on=out.stride(0),
        BITS=bits,
        SPAN=min(group_columns, 128),
        SCALES_BF16=scales_bf16,
        ASM=asm,
        CONSTRAINTS=constraints,
        STRIPS=num_warps,
        PDL=pdl,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue] an option of the launch
        **({"launch_pdl": True} if pdl else {}),
    )


# What CI compiles ahead of time: types of pointers ("x" is the dtype of out, None a tensor that is absent) and flags
_TYPES = {"kernel": dequantize_kernel, "words_ptr": "i32", "meta_ptr": "i32", "out_ptr": "x", "STRIPS": 4, "PDL": False}
VARIANTS = (
    {**_TYPES, "scales_ptr": None, "SPAN": 128},
    {**_TYPES, "scales_ptr": "fp32", "SPAN": 64},
    {**_TYPES, "scales_ptr": None, "SPAN": 32},
)
