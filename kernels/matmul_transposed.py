"""``dx = dy @ W.T`` with W in checkpoint layout: the gradient with respect to x.

    dx[m, k] = sum_n dy[m, n] * scales[g[k], n] * (codes[k, n] - zeros[g[k], n])

Dispatch picks it for every backward. The weight is rounded as in the forward (matmul.py), so both
multiply by the same numbers; sums are float32.
"""

import triton
import triton.language as tl
from torch import Tensor

from .unpack import load_weights


@triton.jit(do_not_specialize=["M"])
def matmul_transposed_kernel(
    dy_ptr,
    qweight_ptr,
    scales_ptr,
    qzeros_ptr,
    g_idx_ptr,
    dx_ptr,
    M,
    N,
    K,
    rows_per_group,
    stride_dym,
    stride_qk,
    stride_sg,
    stride_zg,
    stride_dxm,
    BITS: tl.constexpr,
    ZERO_OFFSET: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_K) tile of dx a program."""
    # Which tile is mine: neighbours share rows of W, so their weights come from L2
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    offs_m = (pid % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = pid // tiles_m * BLOCK_K
    mask_m = offs_m < M

    # First pointers
    offs_n = tl.arange(0, BLOCK_N)
    dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)

    # The loop over N, which is what a product with W.T sums over
    for first_n in range(0, N, BLOCK_N):
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & (first_n + offs_n < N)[None, :], other=0)
        weights = load_weights(
            qweight_ptr, scales_ptr, qzeros_ptr, g_idx_ptr, first_k, first_n, K, N, rows_per_group,
            stride_qk, stride_sg, stride_zg, BITS, ZERO_OFFSET, ONE_GROUP, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        acc = tl.dot(dy, tl.trans(weights.to(dy.dtype)), acc, input_precision="ieee")
        dy_ptrs += BLOCK_N

    # Epilogue: one rounding
    dx = acc.to(dx_ptr.dtype.element_ty)

    # Store
    offs_k = first_k + tl.arange(0, BLOCK_K)
    dx_ptrs = dx_ptr + offs_m[:, None] * stride_dxm + offs_k[None, :]
    tl.store(dx_ptrs, dx, mask=mask_m[:, None] & (offs_k < K)[None, :])


def matmul_transposed(
    dy: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor | None,
    dx: Tensor,
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
    """Launch on the current device and stream; dx is overwritten.

    Args:
        dy: (M, N) float16, bfloat16 or float32, unit stride along N.
        qweight: int32 (ceil(K * bits / 32), N), unit stride along N, as scales and qzeros.
        scales: (G, N), floating.
        qzeros: int32 (G, ceil(N * bits / 32)).
        g_idx: int32 (K,), or None when row k belongs to group k // rows_per_group.
        dx: (M, K), the dtype of dy, unit stride along K. M and K at least 1.
        bits: 2, 3, 4 or 8.
        zero_offset: What to add to a stored zero-point field: 0 or 1.
        rows_per_group: Rows in a full group.
        block_m: Rows of a tile, a power of two from 16.
        block_n: Depth of a step, likewise.
        block_k: Columns of a tile, likewise.
        num_warps: Warps per program.
        num_stages: Steps of the loop in flight.
    """
    (M, N), K = dy.shape, dx.shape[1]
    matmul_transposed_kernel[(triton.cdiv(M, block_m) * triton.cdiv(K, block_k),)](
        dy_ptr=dy,
        qweight_ptr=qweight,
        scales_ptr=scales,
        qzeros_ptr=qzeros,
        g_idx_ptr=g_idx,
        dx_ptr=dx,
        M=M,
        N=N,
        K=K,
        rows_per_group=rows_per_group,
        stride_dym=dy.stride(0),
        stride_qk=qweight.stride(0),
        stride_sg=scales.stride(0),
        stride_zg=qzeros.stride(0),
        stride_dxm=dx.stride(0),
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
# dy, None a tensor that is absent) and flags.
_TYPES = {"dy_ptr": "x", "qweight_ptr": "i32", "scales_ptr": "fp16", "qzeros_ptr": "i32", "dx_ptr": "x"}
VARIANTS = (
    {"kernel": matmul_transposed_kernel, **_TYPES, "g_idx_ptr": None, "ONE_GROUP": True},
    {"kernel": matmul_transposed_kernel, **_TYPES, "g_idx_ptr": "i32", "ONE_GROUP": False},
    {"kernel": matmul_transposed_kernel, **_TYPES, "g_idx_ptr": None, "ONE_GROUP": False},
)
