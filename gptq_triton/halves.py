"""Products as exact as float32's on tensor cores, which multiply numbers of 16 bits several times as fast.

A matrix is the sum of two of float16, 22 bits together, under a power of two for each column; three products of
halves make one. Where there are no such tensor cores, products are PyTorch's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOW = 2.0**11  # what the lower half is multiplied by, so that it is as large as the higher


@dataclass(frozen=True, eq=False)
class Halves:
    """``(high + low / LOW) * scale``.

    Attributes:
        high, low: float16 (R, C).
        scale: Powers of two, float32 (C,).
    """

    high: Tensor
    low: Tensor
    scale: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Halves:
        """Split a float32 (R, C): the largest number of a column lies in [1/2, 1) of its scale."""
        halves = cls.empty(matrix, column_scales(matrix))
        halves[:] = matrix
        return halves

    @classmethod
    def empty(cls, matrix: Tensor, scale: Tensor) -> Halves:
        """Room for a matrix of that shape."""
        high, low = (torch.empty(matrix.shape, dtype=torch.float16, device=matrix.device) for _ in range(2))
        return cls(high, low, scale)

    def __getitem__(self, at: slice | tuple[slice, slice]) -> Halves:
        """Some rows, or some rows and columns."""
        columns = at[1] if isinstance(at, tuple) else slice(None)
        return Halves(self.high[at], self.low[at], self.scale[columns])

    def __setitem__(self, at: slice, rows: Tensor) -> None:
        """Replace rows by float32 ones."""
        if rows.is_cuda:
            from .kernels.passes import split

            split(rows, self.scale, self.high[at], self.low[at], LOW)
            return
        scaled = rows / self.scale  # exact
        high = self.high[at].copy_(scaled)
        torch.mul(scaled.sub_(high), LOW, out=self.low[at])


Matrix = Tensor | Halves


def column_scales(matrix: Tensor) -> Tensor:
    """The least power of two above every number of a column in size, float32 (C,); 1 for a column of zeros."""
    largest = torch.linalg.vector_norm(matrix, torch.inf, 0) if len(matrix) else matrix.new_zeros(matrix.shape[1])
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp_(max=127))


def has_tensor_cores(tensor: Tensor) -> bool:
    """Whether halves are faster than what they stand for."""
    return tensor.is_cuda and not torch.version.hip


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, summed in float32, which total is; halves multiply as they are, where that is fast."""
    if left.dtype in (torch.float16, torch.bfloat16) and has_tensor_cores(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.to(total), right.to(total))


def splittable(matrix: Tensor) -> Matrix:
    """A floating matrix as `inner` takes it."""
    return Halves.of(matrix.float()) if has_tensor_cores(matrix) else matrix


def empty_like(matrix: Tensor) -> Matrix:
    """Room for errors of a float32 (R, C), as `inner` takes them: up to 65504 times as large as a column's largest."""
    if not has_tensor_cores(matrix):
        return torch.empty_like(matrix)
    return Halves.empty(matrix, column_scales(matrix))


def inner(left: Matrix, right: Matrix, into: Tensor | None = None, *, less: bool = False) -> Tensor:
    """``left^T right`` of (R, M) and (R, N), both of one kind: float32 if halves, else their dtype.

    Args:
        left, right: The matrices.
        into: Where the product goes, (M, N) with a unit stride along rows; None: a new tensor.
        less: The product is taken off what is there.
    """
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        total = left.t() @ right
    elif isinstance(left, Halves) and isinstance(right, Halves):
        total = _unscaled(left, right)
        if total.is_cuda:
            from .kernels.passes import scale

            out = total if into is None else into
            scale(total, left.scale, right.scale, out, less=less)
            return out
        total.mul_(left.scale[:, None]).mul_(right.scale)
    else:
        raise TypeError(f"both matrices must be halves, or neither, got {type(left)} and {type(right)}")
    if into is None:
        return total
    return into.sub_(total) if less else into.copy_(total)


def _unscaled(left: Halves, right: Halves) -> Tensor:
    """`inner` before scales, float32."""
    if not len(left.high):
        return left.scale.new_zeros(len(left.scale), len(right.scale))
    cross = _multiply(left.high, right.low)
    cross = _multiply(left.low, right.high, cross, 1.0)
    return _multiply(left.high, right.high, cross, 1 / LOW)


def _multiply(left: Tensor, right: Tensor, added: Tensor | None = None, times: float = 0.0) -> Tensor:
    """``left^T right + times * added`` of float16, summed and returned in float32; added is overwritten."""
    if not left.is_cuda:
        total = left.float().t() @ right.float()
        return total if added is None else added.mul_(times).add_(total)
    if added is None:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.addmm(added, left.t(), right, out_dtype=torch.float32, beta=times, out=added)
