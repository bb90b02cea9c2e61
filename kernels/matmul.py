"""``y = x @ W + bias`` with W in checkpoint layout: portable Triton, every width, every GPU.

    y[m, n] = sum_k x[m, k] * scales[g[k], n] * (codes[k, n] - zeros[g[k], n]) + bias[n]

Dispatch picks it for every forward. ``code - zero`` is exact; the weight is rounded to float32 by
the scale and to the dtype of x for the product; sums, and the bias, are float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from .unpack import load_weights


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    g_idx_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    rows_per_group,
    stride_xm,
    stride_qk,
    stride_sg,
    stride_zg,
    stride_ym,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of y a program."""
    # Which tile is mine: neighbours share columns, so their weights come from L2
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = pid // tiles_m * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M

    # First pointers
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    # The loop over K: unpack a tile of W to the dtype of x, multiply, add
    for first_k in range(0, K, BLOCK_K):
        x = tl.load(x_ptrs, mask=mask_m[:, None] & (first_k + offs_k < K)[None, :], other=0)
        weights = load_weights(
            qweight_ptr, scales_ptr, qzeros_ptr, g_idx_ptr, first_k, first_n, K, N, rows_per_group,
            stride_qk, stride_sg, stride_zg, BITS, ZERO_OFFSET, ONE_GROUP, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        acc = tl.dot(x, weights.to(x.dtype), acc, input_precision="ieee")
        x_ptrs += BLOCK_K

    # Epilogue: the bias joins before the only rounding of y
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0).to(tl.float32)[None, :]

    # Store
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_n < N)[None, :])


def matmul(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    *,
    bits: int,
    zero_offset: int,
    rows_per_group: int,
    block_m: int,
    block_n: int,
    block_k: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launch on the current device and stream; y is overwritten.

    Args:
        x: (M, K) float16, bfloat16 or float32, unit stride along K.
        qweight: int32 (ceil(K * bits / 32), N), unit stride along N, as all that follow.
        scales: (G, N), floating.
        qzeros: int32 (G, ceil(N * bits / 32)).
        g_idx: int32 (K,), or None when row k belongs to group k // rows_per_group.
        bias: (N,), floating, or None.
        y: (M, N), the dtype of x. M and N at least 1.
        bits: 2, 3, 4 or 8.
        zero_offset: What to add to a stored zero-point field: 0 or 1.
        rows_per_group: Rows in a full group.
        block_m: Rows of a tile, a power of two from 16.
        block_n: Columns of a tile, likewise.
        block_k: Depth of a step, a power of two from 32.
        num_warps: Warps per program.
        num_stages: Steps of the loop in flight.
    """
    (M, K), N = x.shape, y.shape[1]
    matmul_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        x_ptr=x,
        qweight_ptr=qweight,
        scales_ptr=scales,
        qzeros_ptr=qzeros,
        g_idx_ptr=g_idx,
        bias_ptr=bias,
        y_ptr=y,
        M=M,
        N=N,
        K=K,
        rows_per_group=rows_per_group,
        stride_xm=x.stride(0),
        stride_qk=qweight.stride(0),
        stride_sg=scales.stride(0),
        stride_zg=qzeros.stride(0),
        stride_ym=y.stride(0),
        BITS=bits,
        ZERO_OFFSET=zero_offset,
        ONE_GROUP=g_idx is None and (rows_per_group % block_k == 0 or rows_per_group >= K),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue] an option of the launch
        num_stages=num_stages,  # pyright: ignore[reportCallIssue]
    )


# What CI compiles ahead of time, with every plan of dispatch: types of pointers ("x" is the dtype of
# x, None a tensor that is absent) and flags.
_TYPES = {"x_ptr": "x", "qweight_ptr": "i32", "scales_ptr": "fp16", "qzeros_ptr": "i32", "y_ptr": "x"}
VARIANTS = (
    {"kernel": matmul_kernel, **_TYPES, "g_idx_ptr": None, "bias_ptr": None, "ONE_GROUP": True},
    {"kernel": matmul_kernel, **_TYPES, "g_idx_ptr": "i32", "bias_ptr": "x", "ONE_GROUP": False},
    {"kernel": matmul_kernel, **_TYPES, "g_idx_ptr": None, "bias_ptr": "fp32", "ONE_GROUP": False},
)
