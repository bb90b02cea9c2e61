"""What the solver does to whole matrices, once through memory where PyTorch would go through it several times.

high + low / unit = matrix / scale, by columns         float16 halves of float32, as `gptq_triton.halves` has them
out[i, j] = matrix[index[i], index[j]] / divisor[index[j]]     and 0 below the diagonal
out = matrix * rows[:, None] * columns                 or that taken off what is there
out[k, n] = scales[group[k], n] * (codes[k, n] - zeros[group[k], n])
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import run


@triton.jit
def _tile(R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and columns of a program's tile, int64, and which of them there are."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return rows, columns, rows < R, columns < C


@triton.jit
def _load(matrix_ptr, rows, columns, mask_r, mask_c, stride, ACROSS: tl.constexpr):
    """matrix[rows, columns] with a unit stride along columns; ACROSS: along rows, which lanes then follow."""
    if ACROSS:
        pointers = matrix_ptr + columns[:, None] * stride + rows[None, :]
        tile = tl.trans(tl.load(pointers, mask=mask_c[:, None] & mask_r[None, :], other=0.0))
    else:
        pointers = matrix_ptr + rows[:, None] * stride + columns[None, :]
        tile = tl.load(pointers, mask=mask_r[:, None] & mask_c[None, :], other=0.0)
    return tile


@triton.jit(
    do_not_specialize=["R", "C", "stride", "stride_out"],
    do_not_specialize_on_alignment=["matrix_ptr", "scale_ptr", "high_ptr", "low_ptr"],
)
def split_kernel(
    matrix_ptr, scale_ptr, high_ptr, low_ptr, R, C, stride, stride_out,
    UNIT: tl.constexpr, ACROSS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_R, BLOCK_C) tile a program."""
    rows, columns, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    tile = _load(matrix_ptr, rows, columns, mask_r, mask_c, stride, ACROSS)
    scale = tl.load(scale_ptr + columns, mask=mask_c, other=1.0)
    scaled = tl.div_rn(tile, scale[None, :] + tl.zeros_like(tile))  # exact: a power of two
    high = scaled.to(tl.float16)
    low = ((scaled - high.to(tl.float32)) * UNIT).to(tl.float16)
    offs = rows[:, None] * stride_out + columns[None, :]
    mask = mask_r[:, None] & mask_c[None, :]
    tl.store(high_ptr + offs, high, mask=mask)
    tl.store(low_ptr + offs, low, mask=mask)


def split(
    matrix: Tensor, scale: Tensor, high: Tensor, low: Tensor, unit: float,
    *, block_r: int = 16, block_c: int = 128, num_warps: int = 4,
) -> None:  # fmt: skip
    """Launch on the current stream of the matrix's device; high and low are overwritten.

    Args:
        matrix: float32 (R, C), unit stride along rows or columns.
        scale: float32 (C,), powers of two above every number of a column in size.
        high, low: float16 (R, C), with equal strides, 1 along rows.
        unit: What the lower half is multiplied by.
        block_r, block_c: Of a tile, powers of two.
        num_warps: Warps per program.
    """
    R, C = matrix.shape
    if not R:
        return
    stride, across = _strides(matrix)
    constants = {"UNIT": unit, "ACROSS": across, "BLOCK_R": block_r, "BLOCK_C": block_c}
    grid = triton.cdiv(R, block_r), triton.cdiv(C, block_c)
    integers = R, C, stride, high.stride(0)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    run(split_kernel, grid, (matrix, scale, high, low), integers, constants, **options)


@triton.jit(
    do_not_specialize=["n", "stride"],
    do_not_specialize_on_alignment=["matrix_ptr", "index_ptr", "divisor_ptr", "out_ptr"],
)
def reorder_kernel(
    matrix_ptr, index_ptr, divisor_ptr, out_ptr, n, stride,
    ACROSS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_R, BLOCK_C) tile a program."""
    rows, columns, mask_r, mask_c = _tile(n, n, BLOCK_R, BLOCK_C)
    from_rows = tl.load(index_ptr + rows, mask=mask_r, other=0)
    from_columns = tl.load(index_ptr + columns, mask=mask_c, other=0)
    tile = _load(matrix_ptr, from_rows, from_columns, mask_r, mask_c, stride, ACROSS)
    divisor = tl.load(divisor_ptr + from_columns, mask=mask_c, other=1.0)[None, :] + tl.zeros_like(tile)
    tile = tl.div_rn(tile, divisor) if tile.dtype == tl.float32 else tile / divisor
    tile = tl.where(rows[:, None] <= columns[None, :], tile, 0.0)
    out_ptrs = out_ptr + rows[:, None] * n + columns[None, :]
    tl.store(out_ptrs, tile.to(out_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])


def reorder(
    matrix: Tensor, index: Tensor, divisor: Tensor, out: Tensor,
    *, block_r: int = 32, block_c: int = 64, num_warps: int = 4,
) -> None:  # fmt: skip
    """Launch on the current stream of the matrix's device; out is overwritten.

    Args:
        matrix: float32 or float64 (n, n), unit stride along rows or columns.
        index: int64 (n,).
        divisor: Of columns, (n,), the dtype of the matrix.
        out: float32 or float64 (n, n), contiguous.
        block_r, block_c: Of a tile, powers of two.
        num_warps: Warps per program.
    """
    n = len(matrix)
    stride, across = _strides(matrix)
    constants = {"ACROSS": across, "BLOCK_R": block_r, "BLOCK_C": block_c}
    grid = triton.cdiv(n, block_r), triton.cdiv(n, block_c)
    run(reorder_kernel, grid, (matrix, index, divisor, out), (n, stride), constants, num_warps=num_warps)


@triton.jit(
    do_not_specialize=["R", "C", "stride"],
    do_not_specialize_on_alignment=["matrix_ptr", "rows_ptr", "columns_ptr", "out_ptr"],
)
def scale_kernel(
    matrix_ptr, rows_ptr, columns_ptr, out_ptr, R, C, stride,
    LESS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_R, BLOCK_C) tile a program."""
    rows, columns, mask_r, mask_c = _tile(R, C, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    tile = tl.load(matrix_ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
    tile *= tl.load(rows_ptr + rows, mask=mask_r, other=0.0)[:, None]
    tile *= tl.load(columns_ptr + columns, mask=mask_c, other=0.0)[None, :]
    out_ptrs = out_ptr + rows[:, None] * stride + columns[None, :]
    if LESS:
        tile = tl.load(out_ptrs, mask=mask, other=0.0) - tile
    tl.store(out_ptrs, tile, mask=mask)


def scale(
    matrix: Tensor, rows: Tensor, columns: Tensor, out: Tensor, *, less: bool,
    block_r: int = 16, block_c: int = 128, num_warps: int = 4,
) -> None:  # fmt: skip
    """Launch on the current stream of the matrix's device.

    Args:
        matrix: float32 (R, C), contiguous.
        rows: What rows are multiplied by, float32 (R,).
        columns: The same of columns, (C,).
        out: float32 (R, C), unit stride along rows; overwritten; may be the matrix.
        less: What is multiplied is taken off what is in out.
        block_r, block_c: Of a tile, powers of two.
        num_warps: Warps per program.
    """
    R, C = matrix.shape
    constants = {"LESS": less, "BLOCK_R": block_r, "BLOCK_C": block_c}
    grid = triton.cdiv(R, block_r), triton.cdiv(C, block_c)
    options = {"num_warps": num_warps, "enable_fp_fusion": False}
    run(scale_kernel, grid, (matrix, rows, columns, out), (R, C, out.stride(0)), constants, **options)


@triton.jit(
    do_not_specialize=["K", "N"],
    do_not_specialize_on_alignment=["codes_ptr", "groups_ptr", "scales_ptr", "zeros_ptr", "out_ptr"],
)
def values_kernel(
    codes_ptr, groups_ptr, scales_ptr, zeros_ptr, out_ptr, K, N, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One (BLOCK_R, BLOCK_C) tile a program."""
    rows, columns, mask_r, mask_c = _tile(K, N, BLOCK_R, BLOCK_C)
    mask = mask_r[:, None] & mask_c[None, :]
    offs = rows[:, None] * N + columns[None, :]
    codes = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    group = tl.load(groups_ptr + rows, mask=mask_r, other=0)[:, None] * N + columns[None, :]
    scales = tl.load(scales_ptr + group, mask=mask, other=0.0).to(tl.float32)
    zeros = tl.load(zeros_ptr + group, mask=mask, other=0.0)
    tl.store(out_ptr + offs, scales * (codes - zeros), mask=mask)


def values(
    codes: Tensor, groups: Tensor, scales: Tensor, zeros: Tensor, out: Tensor,
    *, block_r: int = 16, block_c: int = 128, num_warps: int = 4,
) -> None:  # fmt: skip
    """Launch on the current stream of the codes' device; all are contiguous; out is overwritten.

    Args:
        codes: uint8 (K, N).
        groups: Each row's, int64 (K,).
        scales: 16 bits or float32 (G, N).
        zeros: float32 (G, N).
        out: float32 (K, N).
        block_r, block_c: Of a tile, powers of two.
        num_warps: Warps per program.
    """
    K, N = codes.shape
    constants = {"BLOCK_R": block_r, "BLOCK_C": block_c}
    grid = triton.cdiv(K, block_r), triton.cdiv(N, block_c)
    run(values_kernel, grid, (codes, groups, scales, zeros, out), (K, N), constants, num_warps=num_warps)


def _strides(matrix: Tensor) -> tuple[int, bool]:
    """The stride that is not 1, and whether it is that along columns."""
    down, along = matrix.stride()
    if along == 1:
        return down, False
    if down == 1:
        return along, True
    raise ValueError(f"matrix must have a unit stride, got {matrix.stride()}")


# What CI compiles ahead of time: types of pointers and constants
VARIANTS = (
    *(
        {"kernel": split_kernel, "matrix_ptr": "fp32", "scale_ptr": "fp32", "high_ptr": "fp16", "low_ptr": "fp16",
         "UNIT": 2048.0, "ACROSS": across, "BLOCK_R": 16, "BLOCK_C": 128}
        for across in (False, True)
    ),
    *(
        {"kernel": reorder_kernel, "matrix_ptr": kind, "index_ptr": "i64", "divisor_ptr": kind, "out_ptr": "fp32",
         "ACROSS": across, "BLOCK_R": 32, "BLOCK_C": 64}
        for kind, across in (("fp64", True), ("fp32", True), ("fp32", False))
    ),
    *(
        {"kernel": scale_kernel, "matrix_ptr": "fp32", "rows_ptr": "fp32", "columns_ptr": "fp32", "out_ptr": "fp32",
         "LESS": less, "BLOCK_R": 16, "BLOCK_C": 128}
        for less in (False, True)
    ),
    {"kernel": values_kernel, "codes_ptr": "u8", "groups_ptr": "i64", "scales_ptr": "x", "zeros_ptr": "fp32",
     "out_ptr": "fp32", "BLOCK_R": 16, "BLOCK_C": 128},
)  # fmt: skip
