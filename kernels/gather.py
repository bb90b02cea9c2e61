"""Columns of x in the order of kernel tiles, for weights whose groups are not runs of columns (act-order).

    out[m, c] = x[m, order[c]], or 0 where order[c] is -1; or x[rows[m], order[c]]

Dispatch runs it before matmul.py, large.py and a product with what dequantize.py makes, the solver on Hessians. A row
goes to shared memory as a whole, where neighbours in the new order need not be neighbours; from L2, each two bytes
would bring 32.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .launch import run

WHOLE_ROW = 1 << 16  # bytes of the longest row that shared memory holds, on any GPU
PROGRAMS = 256  # that keep a GPU busy


@triton.jit(
    do_not_specialize=["K", "C", "stride_xm", "stride_om"],
    do_not_specialize_on_alignment=["x_ptr", "order_ptr", "rows_ptr", "out_ptr"],
)
def gather_kernel(
    x_ptr, order_ptr, rows_ptr, out_ptr, K, C, stride_xm, stride_om,
    ALIGNED: tl.constexpr, PDL: tl.constexpr, NUMBERS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_C columns of a row of out a program; the row of x takes NUMBERS, a power of two, or is too long: 0."""
    if PDL:
        gdc_launch_dependents()  # the product, which waits for this kernel
    # Which columns are mine
    m = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_C
    x_ptr += (m if rows_ptr is None else tl.load(rows_ptr + m)) * stride_xm
    order_ptr += first
    out_ptr += m * stride_om + first
    offs_c = tl.arange(0, BLOCK_C)
    left = C - first
    if ALIGNED:  # the same, and Triton knows what divides it
        x_ptr, K = tl.multiple_of(x_ptr, 16), K // 8 * 8
        order_ptr, out_ptr, left = tl.multiple_of(order_ptr, 16), tl.multiple_of(out_ptr, 16), left // 8 * 8
    mask = offs_c < left
    order = tl.load(order_ptr + offs_c, mask=mask, other=-1)

    # Load
    if PDL:
        gdc_wait()
    if NUMBERS > 0:
        offs_k = tl.arange(0, NUMBERS)
        row = tl.load(x_ptr + offs_k, mask=offs_k < K, other=0)
        values = tl.gather(row, tl.maximum(order, 0), 0)
        values = tl.where(order >= 0, values, tl.zeros_like(values))
    else:
        values = tl.load(x_ptr + order, mask=order >= 0, other=0)

    # Store
    tl.store(out_ptr + offs_c, values, mask=mask)


def gather(
    x: Tensor, order: Tensor, out: Tensor, rows: Tensor | None = None, *, pdl: bool = False, whole_row: int = WHOLE_ROW
) -> None:
    """Launch on the current stream of the device of x; out is overwritten.

    Args:
        x: (M, K), or with more rows, any dtype, unit stride along K.
        order: int32 (C,), in [-1, K).
        out: (M, C), the dtype of x or a wider one, unit stride along C; M and C at least 1.
        rows: int64 (M,), which row of x is meant; default: each one.
        pdl: Programmatic dependent launch (sm_90 on).
        whole_row: Bytes of the longest row that goes to shared memory.
    """
    (M, C), K = out.shape, x.shape[1]
    numbers = triton.next_power_of_2(K)
    if numbers * x.element_size() > whole_row:
        numbers = 0
    parts = max(1, min(8, PROGRAMS // M)) if numbers else 8
    block_c = triton.next_power_of_2(max(triton.cdiv(C, parts), min(C, 2048), 128))
    addresses = x.data_ptr() | order.data_ptr() | out.data_ptr()
    aligned = addresses % 16 == 0 and not any(n % 8 for n in (K, C, x.stride(0), out.stride(0)))
    constants = {"ALIGNED": aligned, "PDL": pdl, "NUMBERS": numbers, "BLOCK_C": block_c}
    # a thread has about 8 numbers of the row, and 16 columns at most
    warps = max(4, min(32, max(numbers // 256, block_c // 512)))
    options = {"num_warps": warps} | ({"launch_pdl": True} if pdl else {})
    integers = K, C, x.stride(0), out.stride(0)
    run(gather_kernel, (M, triton.cdiv(C, block_c)), (x, order, rows, out), integers, constants, **options)


# What CI compiles ahead of time: types of pointers ("x" is the dtype of x) and constants
VARIANTS = tuple(
    {"kernel": gather_kernel, "x_ptr": "x", "order_ptr": "i32", "rows_ptr": None if whole else "i64", "out_ptr": "x",
     "ALIGNED": whole, "PDL": False, "NUMBERS": 4096 if whole else 0, "BLOCK_C": 2048}
    for whole in (True, False)
)  # fmt: skip
