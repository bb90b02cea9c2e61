"""What GPTQ knows of a layer's inputs: their second moments, and the factor of them by which errors are moved."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .aside import Aside
from .halves import Matrix, add_product, has_tensor_cores, inner, splittable

STRIPS = 4  # of a symmetric product, whose lower triangle is not computed
FEW = 1 << 34  # multiplications that a GPU is done with before it could be told of strips
PANEL = 2048  # columns of a Cholesky factor that are found at once
CORNER = 128  # rows of a triangle that are inverted one after another
CHUNK = 4096  # tokens of one product on tensor cores, whose sums are kept less exactly than float32


class Hessian:
    """``sum x^T x`` over the tokens a layer saw, in float32.

    Args:
        K: In-features.
        device: Where to accumulate.
    """

    def __init__(self, K: int, device: torch.device | str | None = None):
        self.sum = torch.zeros(K, K, dtype=torch.float32, device=device)
        self.drift: Tensor | None = None  # sum x^T (x_full - x)
        self.tokens = 0

    def add(self, x: Tensor, full: Tensor | None = None) -> None:
        """Count the rows of x, (..., K), floating. float16 and bfloat16 products are exact here.

        Args:
            x: What the layer is given.
            full: What it is given in the full-precision model, like x.
        """
        rows = x.reshape(-1, self.sum.shape[0])
        self.tokens += rows.shape[0]
        _add_square(self.sum, rows)
        if full is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.sum)
            rows = rows.to(self.sum)
            self.drift.addmm_(rows.t(), full.reshape(rows.shape).to(rows) - rows)

    def merge(self, other: Hessian) -> None:
        """Count what another of the same layer saw."""
        self.sum += other.sum
        self.tokens += other.tokens
        if other.drift is not None:
            self.drift = other.drift if self.drift is None else self.drift.add_(other.drift)


def _add_square(total: Tensor, rows: Tensor) -> None:
    """``total += rows^T rows``, float32 += floating, one triangle computed and mirrored: the result is symmetric."""
    half = rows.dtype in (torch.float16, torch.bfloat16) and has_tensor_cores(total) and rows.is_cuda
    chunks = rows.split(CHUNK) if half else [rows.to(total)]
    K = len(total)
    width = K if half and len(rows) * K * K < FEW else -(-K // STRIPS)
    for start in range(0, K, width):
        stop = min(start + width, K)
        for chunk in chunks:
            add_product(total[start:stop, start:], chunk[:, start:stop].t(), chunk[:, start:])
        total[stop:, start:stop] = total[start:stop, stop:].t()


@dataclass(frozen=True, eq=False)
class Factor:
    """``H = unit @ diag(cost) @ unit.T`` of a damped Hessian, in the order in which columns are rounded.

    In the terms of the paper, whose U is the upper Cholesky factor of H^-1: ``unit`` is U^-1 with its columns divided
    by its diagonal, and ``cost`` is 1 / U_jj^2, what the square of an error costs once the columns that follow have
    made up for it. H^-1 itself is never needed.

    Attributes:
        unit: Upper, with ones on the diagonal, float32 (K, K).
        cost: > 0, float32 (K,).
    """

    unit: Tensor
    cost: Tensor

    @functools.cached_property
    def products(self) -> Matrix:
        """``unit`` as products take it."""
        return splittable(self.unit)

    def divide(self, columns: Tensor) -> Tensor:
        """``H^-1 columns``, for float32 (K, N)."""
        inner = torch.linalg.solve_triangular(self.unit, columns, upper=True, unitriangular=True)
        inner /= self.cost[:, None]
        return torch.linalg.solve_triangular(self.unit.t(), inner, upper=False, unitriangular=True)


def factorize(H: Tensor, order: Tensor, damp: float, dtype: torch.dtype = torch.float64) -> tuple[Factor | None, float]:
    """The factor of ``H + damping``, and the damping it took; None if none up to 1 helps.

    Args:
        H: (K, K), symmetric, float32.
        order: Of the factor's rows and columns, int64 (K,).
        damp: The least damping, as a fraction of the mean of H's diagonal; raised tenfold as often as needed.
        dtype: Of the arithmetic.
    """
    while True:
        factor, failed = attempt(H, order, damp, dtype)
        if not bool(failed):
            return factor, damp
        if damp >= 1:
            return None, damp
        damp = min(10 * damp, 1.0)


def attempt(H: Tensor, order: Tensor, damp: float, dtype: torch.dtype = torch.float64) -> tuple[Factor, Tensor]:
    """The factor of ``H + damping``, and whether it could not be found: then it holds anything.

    A GPU is not waited for. One Cholesky of the matrix with rows and columns reversed gives H = R R^T with R upper.
    Arguments are those of `factorize`.
    """
    by_panels = has_tensor_cores(H) and len(H) > 2 * PANEL
    damped = reordered(H, order.flip(0), H.dtype if by_panels else dtype)
    damped.diagonal().add_(damp * H.diagonal().double().mean())
    lower, failed = _cholesky(damped) if by_panels else torch.linalg.cholesky_ex(damped)
    diagonal, backwards = lower.diagonal().clone(), torch.arange(len(H) - 1, -1, -1, device=H.device)
    unit = reordered(lower, backwards, torch.float32, diagonal)
    return Factor(unit, diagonal.flip(0).square().float()), failed


def reordered(matrix: Tensor, index: Tensor, dtype: torch.dtype, divisor: Tensor | None = None) -> Tensor:
    """``matrix[index][:, index]``; with a divisor of each column, the upper triangle of the quotient alone."""
    if matrix.is_cuda:
        from .kernels import gather, passes

        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
        if divisor is None:
            gather.gather(matrix.contiguous(), index.to(torch.int32), out, index)
        else:
            passes.reorder(matrix, index, divisor, out)
        return out
    if divisor is None:
        return matrix[index][:, index].to(dtype)
    return (matrix / divisor)[index][:, index].to(dtype).triu_()


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """As torch.linalg.cholesky_ex, of a float32 matrix that its factor overwrites, with anything above the diagonal.

    Corners of the diagonal are factored and inverted in float64, the next one beside what this one takes off the rest;
    all else is products of halves. Memory holds the factor's transpose, whose panels are rows.
    """
    K, failed = len(matrix), torch.zeros((), dtype=torch.int32, device=matrix.device)

    def corner(start: int) -> tuple[Tensor, Tensor, Matrix | None]:
        """Its factor, whether there is none, and the transposed inverse, unless columns follow."""
        stop = min(start + PANEL, K)
        lower, info = torch.linalg.cholesky_ex(matrix[start:stop, start:stop].double())
        return lower, info, splittable(_inverse(lower).t().float()) if stop < K else None

    lower, info, inverse = corner(0)
    for start in range(0, K, PANEL):
        stop = start + len(lower)
        failed |= info
        matrix[start:stop, start:stop] = lower.t()
        if inverse is None:
            break
        # upper^T X = beside
        beside = matrix[start:stop, stop:]
        solved = splittable(inner(inverse, splittable(beside), beside))
        _take_off(matrix, stop, solved, stop)
        ahead = Aside(matrix.device, "corners")
        lower, info, inverse = ahead.run(functools.partial(corner, stop))
        for first in range(stop + PANEL, K, PANEL):
            _take_off(matrix, stop, solved, first)
        ahead.join()
    return matrix.t(), failed


def _take_off(matrix: Tensor, start: int, solved: Matrix, first: int) -> None:
    """What rows before ``start``, solved (rows, K - start), take off PANEL columns of what is left."""
    last = min(first + PANEL, len(matrix))
    inner(solved[:, : last - start], solved[:, first - start : last - start], matrix[start:last, first:last], less=True)


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangle (n, n): of blocks on the diagonal, then of twice as large ones, all of a size at once."""
    n, size = len(lower), len(lower)
    while size % 2 == 0 and size > CORNER:
        size //= 2

    def diagonal(size: int) -> Tensor:
        return lower.unflatten(1, (-1, size)).unflatten(0, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)

    eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(diagonal(size), eye, upper=False)
    while size < n:
        first, second = inverse[::2], inverse[1::2]
        low = second @ diagonal(2 * size)[:, size:, :size] @ first
        inverse = torch.cat([torch.cat([first, torch.zeros_like(first)], 2), torch.cat([-low, second], 2)], 1)
        size *= 2
    return inverse[0]


def energy(columns: Tensor, H: Tensor) -> Tensor:
    """``tr(E^T H E)`` for E float32 (K, N) and a symmetric H, float64 (); on NVIDIA GPUs, E is rounded to bfloat16.

    There the products are those of ``E E^T``, whose many terms average the roundings out: some 1e-5 of the result.
    """
    if not has_tensor_cores(columns):
        return (H @ columns).mul_(columns).sum(dtype=torch.float64)
    rounded, total = columns.bfloat16(), torch.zeros((), dtype=torch.float64, device=columns.device)
    width = -(-len(H) // STRIPS)
    for start in range(0, len(H), width):
        rows = rounded[start : start + width]
        products = torch.mm(rows, rounded[start:].t(), out_dtype=torch.float32).mul_(H[start : start + width, start:])
        inside = products[:, : len(rows)].sum(1).sum(dtype=torch.float64)
        total += 2 * products.sum(1).sum(dtype=torch.float64) - inside  # what lies right of the diagonal counts twice
    return total
