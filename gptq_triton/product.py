"""Products with a tiled weight on a GPU: which plan, and what is kept of it for the next one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import dispatch, tables
from .launches import Launch, Operands, multiply_transposed, prepare_launch
from .layout import STEP, TiledWeight
from .plans import GradientPlan, Plan, Problem


def product(x: Tensor, bias: Tensor | None, weight: TiledWeight, batch_invariant: bool = False) -> Tensor:
    """``x @ W + bias``, as `ops.matmul` says, for x (..., K), without gradients."""
    K = weight.K
    y = x.new_empty((*x.shape[:-1], weight.N))
    M = x.numel() // K
    if M == 0:
        return y
    if not x.is_contiguous():
        x = x.reshape(M, K)
        x = x if x.stride(1) == 1 else x.contiguous()
    stride = x.stride(-2) if x.dim() == 2 else K
    rows = dispatch.rows_of_decode(weight.group_columns) if batch_invariant else M
    if rows >= M:
        _launch(weight, M, stride, x, bias, batch_invariant)(x, stride, bias, weight, y)
        return y
    xs, ys = _rows(x, M), _rows(y, M)
    for first in range(0, M, rows):
        part = xs[first : first + rows]
        launch = _launch(weight, len(part), stride, part, bias, batch_invariant)
        launch(part, stride, bias, weight, ys[first : first + rows])
    return y


def _launch(weight: TiledWeight, M: int, stride: int, x: Tensor, bias: Tensor | None, batch_invariant: bool) -> Launch:
    """Everything about a product but its values; kept with the weight, so that a warm call looks up little."""
    aligned = x.data_ptr() % 16 == 0 and stride % 8 == 0
    key = (M, x.dtype, aligned, batch_invariant, None if bias is None else bias.dtype)
    launch = weight.launches.get(key)
    if launch is None:
        problem = problem_of(M, x.dtype, x.get_device(), weight, aligned)
        launch = _prepared(problem, Operands.of(weight, bias, aligned), x.get_device(), batch_invariant)
        weight.launches[key] = launch
    return launch


@functools.lru_cache(maxsize=1 << 12)
def _prepared(problem: Problem, operands: Operands, device: int, batch_invariant: bool) -> Launch:
    parts = plans_of(problem, device, batch_invariant)
    launches = [prepare_launch(part, plan, operands, device) for part, plan in parts]
    if len(launches) == 1:
        return launches[0]

    def launch(x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        xs, ys = _rows(x, problem.M), _rows(y, problem.M)
        first = 0
        for (part, _), one in zip(parts, launches, strict=True):
            one(xs[first : first + part.M], stride, bias, weight, ys[first : first + part.M])
            first += part.M

    return launch


def _rows(x: Tensor, M: int) -> Tensor:
    return x if x.dim() == 2 else x.view(M, x.shape[-1])


def plans_of(problem: Problem, device: int, batch_invariant: bool = False) -> list[tuple[Problem, Plan]]:
    """How ``x @ W`` is computed, some rows of x after others: as a table of measured plans says, else as estimated."""
    if batch_invariant:
        return [(problem, dispatch.choose(problem, batch_invariant=True))]
    plan = tables.lookup(gpu_name(device), problem)
    rows = problem.M if plan else dispatch.rows_at_once(problem)
    if rows < problem.M:
        first, rest = problem.split_at(rows)
        return plans_of(first, device) + plans_of(rest, device)
    return [(problem, plan or dispatch.choose(problem))]


def forget() -> None:
    """Choose plans anew: the tables have changed."""
    _prepared.cache_clear()


def product_transposed(dy: Tensor, weight: TiledWeight) -> Tensor:
    """``dy @ W.T``, as `ops.matmul_transposed` says, without gradients."""
    M = len(dy)
    if M == 0:
        return dy.new_empty(0, weight.K)
    columns = weight.K if weight.order is None else weight.steps * STEP
    dx, first = dy.new_empty(M, columns), 0
    with torch.cuda.device(dy.device):
        problem = problem_of(M, dy.dtype, dy.get_device(), weight)
        for part, plan in plans_transposed(problem, aligned=weight.N % 8 == columns % 8 == 0):
            rows = slice(first, first + part.M)
            multiply_transposed(part, plan, dy[rows], weight, dx[rows])
            first += part.M
    return dx if weight.order is None else dx[:, weight.inverse_order()]


def plans_transposed(problem: Problem, *, aligned: bool = True) -> list[tuple[Problem, GradientPlan]]:
    """How ``dy @ W.T`` is computed, some rows of dy after others."""
    rows = dispatch.rows_at_once_transposed(problem, aligned=aligned)
    if rows < problem.M:
        first, rest = problem.split_at(rows)
        return plans_transposed(first, aligned=aligned) + plans_transposed(rest, aligned=aligned)
    return [(problem, dispatch.choose_transposed(problem, aligned=aligned))]


def problem_of(M: int, dtype: torch.dtype, device: int, weight: TiledWeight, aligned: bool = True) -> Problem:
    """What plans for M rows of x, which start at multiples of 16 bytes if aligned, and this weight depend on."""
    half_scales, ordered = weight.dtype != torch.float32, weight.order is not None
    # float16 has not the range of bfloat16
    large = (aligned or ordered) and weight.N % 8 == 0 and dtype in (weight.dtype, torch.bfloat16)
    return Problem(
        M, weight.strips, weight.steps, weight.spec.bits, weight.group_columns, dtype, half_scales, *gpu(device),
        large, ordered,
    )  # fmt: skip


@functools.cache
def gpu(device: int) -> tuple[str, int]:
    """The architecture of a GPU, as "sm_90" or "gfx942", and the number of its multiprocessors."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


@functools.cache
def gpu_name(device: int) -> str:
    """The name of a GPU, as tables and folders are called: "h200"."""
    return torch.cuda.get_device_name(device).removeprefix("NVIDIA ").lower().replace(" ", "-")
