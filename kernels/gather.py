"""Columns of x in the order of kernel tiles, for weights whose groups are not runs of columns (act-order).

    out[m, c] = x[m, order[c]], or 0 where order[c] is -1

Dispatch runs it before matmul.py and before a product with what dequantize.py makes.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["M"])
def gather_kernel(x_ptr, order_ptr, out_ptr, M, C, stride_xm, stride_om, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """One (BLOCK_M, BLOCK_C) tile of out a program."""
    # Which tile is mine
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]

    # Load
    order = tl.load(order_ptr + offs_c, mask=offs_c < C, other=-1)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + order[None, :]
    values = tl.load(x_ptrs, mask=mask & (order >= 0)[None, :], other=0)

    # Store
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_c[None, :], values, mask=mask)


def gather(x: Tensor, order: Tensor, out: Tensor, *, block_m: int = 4, block_c: int = 512, num_warps: int = 4) -> None:
    """Launch on the current device and stream; out is overwritten.

    Args:
        x: (M, K), any dtype, unit stride along K.
        order: int32 (C,), in [-1, K).
        out: (M, C), the dtype of x, unit stride along C; M and C at least 1.
        block_m: Rows of a tile, a power of two.
        block_c: Columns of a tile, a power of two.
        num_warps: Warps per program.
    """
    M, C = out.shape
    gather_kernel[(triton.cdiv(M, block_m), triton.cdiv(C, block_c))](
        x_ptr=x,
        order_ptr=order,
        out_ptr=out,
        M=M,
        C=C,
        stride_xm=x.stride(0),
        stride_om=out.stride(0),
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=num_warps,  # pyright: ignore[reportCallIssue] an option of the launch
    )


# What CI compiles ahead of time: types of pointers ("x" is the dtype of x) and constants
VARIANTS = ({"kernel": gather_kernel, "x_ptr": "x", "order_ptr": "i32", "out_ptr": "x", "BLOCK_M": 4, "BLOCK_C": 512},)
