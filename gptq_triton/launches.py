"""A plan as launches: the kernels compiled for it, the memory that they need, what they are called with.

`product.py` says which plan.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .halves import add_product
from .layout import STEP, STRIP, TiledWeight
from .plans import (
    DecodePlan,
    DequantizePlan,
    GradientPlan,
    LargePlan,
    MatmulPlan,
    Plan,
    Problem,
    TransposedPlan,
    WidePlan,
    power_of_two,
)
from .scratch import scratch_of

# x, contiguous but for its row stride; that stride; the bias; the weight; contiguous y
Launch = Callable[[Tensor, int, "Tensor | None", TiledWeight, Tensor], None]


@dataclass(frozen=True)
class Operands:
    """What a compiled launch depends on beside the problem.

    Attributes:
        K: Columns of x.
        N: Columns of y.
        bias: Dtype of the bias, or None.
        scales: Dtype of the scales.
        aligned: Whether rows of x start at multiples of 16 bytes.
    """

    K: int
    N: int
    bias: torch.dtype | None
    scales: torch.dtype
    aligned: bool

    @property
    def paired(self) -> bool:
        """Whether columns 2 i and 2 i + 1 of x lie in one word."""
        return self.aligned and self.K % 2 == 0

    @classmethod
    def of(cls, weight: TiledWeight, bias: Tensor | None, aligned: bool) -> Operands:
        """Those of a product."""
        bias_dtype = None if bias is None else bias.dtype
        return cls(weight.K, weight.N, bias_dtype, weight.dtype, aligned)


def prepare_launch(problem: Problem, plan: Plan, operands: Operands, device: int) -> Launch:
    """Compile a plan for the current stream of a device."""
    if isinstance(plan, DequantizePlan):
        launch = functools.partial(_by_floats, problem, plan)
    elif isinstance(plan, MatmulPlan):
        launch = functools.partial(_matmul, problem, plan, device)
    elif isinstance(plan, LargePlan):
        launch = _large(problem, plan, operands, device)
    elif isinstance(plan, DecodePlan) and plan.own_digits:
        launch = _decode_alone(problem, plan, operands, device)
    else:
        launch = _by_digits(problem, plan, operands, device)
    if torch.cuda.device_count() == 1:
        return launch

    def guarded(*arguments: Any) -> None:
        with torch.cuda.device(device):
            launch(*arguments)

    return guarded


def _form(problem: Problem, scales: torch.dtype) -> dict[str, Any]:
    """What every kernel is told of a weight's form."""
    return {
        "bits": problem.bits,
        "group_columns": problem.group_columns,
        "scales_bf16": scales == torch.bfloat16,
    }


def _decode_alone(problem: Problem, plan: DecodePlan, operands: Operands, device: int) -> Launch:
    """One launch, whose programs find the digits of x."""
    M, K, N = problem.M, operands.K, operands.N
    strips, steps, grid = problem.strips, problem.steps, plan.grid(problem)
    tiles = asdict(plan)
    del tiles["own_digits"]
    multiply = kernels("decode").prepare_decode(
        device,
        problem.dtype,
        operands.bias,
        **_form(problem, operands.scales),
        pdl=problem.capability >= 90,
        own_rows=M,
        aligned=operands.paired,
        numbers=power_of_two(K) if problem.ordered else 0,
        **tiles,
    )
    words, counters = _meeting(problem, plan)
    scratch = scratch_of(device)

    def launch(x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream, order = torch._C._cuda_getCurrentRawStream(device), weight.order
        partial, zeros = scratch.get(stream, words, counters) if counters else (None, None)
        multiply(
            *grid, stream,
            x.data_ptr(), None if order is None else order.data_ptr(), None, None,
            weight.words.data_ptr(), weight.meta.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
            partial, zeros, M, N, K, steps, strips, stride, N,
        )  # fmt: skip

    return launch


def _by_digits(problem: Problem, plan: DecodePlan | WidePlan, operands: Operands, device: int) -> Launch:
    """Two launches: the digits of x, then the product."""
    M, K, N = problem.M, operands.K, operands.N
    strips, steps, grid = problem.strips, problem.steps, plan.grid(problem)
    pdl = problem.capability >= 90
    wide = isinstance(plan, WidePlan)
    rows, turns = plan.rows(problem), plan.turns(problem)
    subgroups = problem.subgroups // turns
    chosen = asdict(plan) | ({"rows": rows} if wide else {})
    chosen.pop("own_digits", None)
    multiply = (kernels("wide").prepare_wide if wide else kernels("decode").prepare_decode)(
        device,
        problem.dtype,
        operands.bias,
        **_form(problem, operands.scales),
        pdl=pdl,
        **chosen,
    )
    digits_of_x = kernels("digits").prepare_digits(
        device,
        problem.dtype,
        ordered=problem.ordered,
        subgroups=subgroups,
        turns=turns,
        tiles=0 if wide else plan.tiles,
        rows=rows if wide else 0,
        aligned=operands.paired,
        pdl=pdl,
    )
    # one piece of memory, in words: digits, sums, partial sums
    columns = rows * subgroups
    digit_words, sum_words = steps * columns * 64, steps * columns * 2 * turns
    partial_words, counters = _meeting(problem, plan)
    words = digit_words + sum_words + partial_words
    scratch = scratch_of(device)

    def launch(x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        order = weight.order
        with scratch.lock:  # the two launches belong together
            digits, zeros = scratch.get(stream, words, counters)
            sums = digits + 4 * digit_words
            digits_of_x(
                steps, M, stream,
                x.data_ptr(), None if order is None else order.data_ptr(), digits, sums, K, stride,
            )  # fmt: skip
            multiply(
                *grid, stream, None, None,
                digits, sums, weight.words.data_ptr(), weight.meta.data_ptr(),
                None if bias is None else bias.data_ptr(), y.data_ptr(),
                sums + 4 * sum_words if counters else None, zeros if counters else None,
                M, N, K, steps, strips, K, N,
            )  # fmt: skip

    return launch


def _meeting(problem: Problem, plan: DecodePlan | WidePlan) -> tuple[int, int]:
    """Words of the partial sums of programs that share tiles of y, and the tiles."""
    parts = plan.parts(problem)
    tiles = -(-problem.strips // plan.strips_of_program) if parts else 0
    return parts * STRIP * plan.strips_of_program * plan.rows(problem), tiles


def _matmul(
    problem: Problem,
    plan: MatmulPlan,
    device: int,
    x: Tensor,
    stride: int,
    bias: Tensor | None,
    weight: TiledWeight,
    y: Tensor,
) -> None:
    M = problem.M
    x = _in_order(problem, x.view(M, weight.K) if x.dim() != 2 else x, weight)
    scratch = scratch_of(device)
    with scratch.lock:
        workspace = counters = None
        if plan.split > 1:
            stream = torch._C._cuda_getCurrentRawStream(device)
            words, zeros = scratch.tensors(stream, plan.split * M * problem.strips * STRIP, plan.tiles(problem))
            workspace, counters = words.view(torch.float32), zeros
        kernels("matmul").matmul(
            x,
            weight.words,
            weight.meta,
            weight.scales,
            bias,
            y.view(M, weight.N),
            workspace,
            counters,
            **_form(problem, weight.dtype),
            **asdict(plan),
        )


def _large(problem: Problem, plan: LargePlan, operands: Operands, device: int) -> Launch:
    shares = plan.shares(problem)
    multiply = kernels("large").prepare_large(
        device,
        problem.dtype,
        operands.bias,
        **_form(problem, operands.scales),
        block_m=plan.block_m,
        groups=plan.groups,
        stages=plan.stages,
        resident=plan.resident,
        shares=shares.streamed > 0,
        pdl=True,
    )
    M, K, N = problem.M, operands.K, operands.N
    sums = shares.sharing * 64 * plan.groups * plan.block_m
    scratch = scratch_of(device)

    def launch(x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        x = _in_order(problem, x.view(M, K) if x.dim() != 2 else x, weight)
        with scratch.lock:
            workspace = counters = None
            if shares.streamed:
                workspace, counters = scratch.tensors(stream, sums, shares.streamed * plan.groups)
            multiply(shares, stream, x, weight.words, weight.meta, y.view(M, N), bias, workspace, counters)

    return launch


@contextlib.contextmanager
def _sums_of_floats() -> Iterator[None]:
    """The vendor adds parts of a sum in float32: PyTorch's default lets it add halves, against the error contract."""
    settings = torch.backends.cuda.matmul
    with _settings_lock:
        allowed = [f"allow_{half}_reduced_precision_reduction" for half in ("fp16", "bf16")]
        allowed = [name for name in allowed if getattr(settings, name)]
        try:
            for name in allowed:
                setattr(settings, name, False)
            yield
        finally:
            for name in allowed:
                setattr(settings, name, True)


_settings_lock = threading.Lock()


@_sums_of_floats()
def _by_floats(
    problem: Problem, plan: DequantizePlan, x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor
) -> None:
    x = _in_order(problem, x.view(problem.M, weight.K) if x.dim() != 2 else x, weight)
    y = y.view(problem.M, weight.N)
    for first, w in _slabs(problem, plan, weight, x.dtype, x.shape[1]):
        part = y[:, first : first + len(w)]
        if bias is None:
            torch.mm(x, w.t(), out=part)
        else:
            torch.addmm(bias[first : first + len(w)].to(x.dtype), x, w.t(), out=part)


def multiply_transposed(problem: Problem, plan: GradientPlan, dy: Tensor, weight: TiledWeight, dx: Tensor) -> None:
    """``dx = dy @ W.T``, its columns in the order of the tiles, on the current stream of the current device."""
    if isinstance(plan, TransposedPlan):
        _by_tiles(problem, plan, dy, weight, dx)
    else:
        _by_slabs(problem, plan, dy, weight, dx)


def _by_tiles(problem: Problem, plan: TransposedPlan, dy: Tensor, weight: TiledWeight, dx: Tensor) -> None:
    device = dy.get_device()
    if dy.stride(1) != 1 or dy.stride(0) % 8 or dy.data_ptr() % 16:
        dy = dy.clone(memory_format=torch.contiguous_format)
    multiply = kernels("transposed").prepare_transposed(
        device,
        dy.dtype,
        **_form(problem, weight.dtype),
        block_m=plan.block_m,
        stages=plan.stages,
        products=plan.products(plan.block_m, plan.resident),
        unit=plan.unit,
        group_m=plan.group_m,
        resident=plan.resident,
    )
    sums = plan.shares.sharing * STEP * plan.block_m if plan.shares.streamed else 0
    stream = torch._C._cuda_getCurrentRawStream(device)
    scratch = scratch_of(device)
    with scratch.lock:
        memory, counters = scratch.get(stream, sums, 2 * plan.shares.streamed)
        multiply(plan.shares, stream, dy, weight.words, weight.meta, dx, memory, counters)


@_sums_of_floats()
def _by_slabs(problem: Problem, plan: DequantizePlan, dy: Tensor, weight: TiledWeight, dx: Tensor) -> None:
    slabs = _slabs(problem, plan, weight, dy.dtype, dx.shape[1])
    if weight.strips <= plan.strips:
        torch.mm(dy, next(slabs)[1], out=dx)
        return
    total = torch.zeros(dx.shape, dtype=torch.float32, device=dx.device)
    for first, w in slabs:
        add_product(total, dy[:, first : first + len(w)], w)
    dx.copy_(total)


def _slabs(
    problem: Problem, plan: DequantizePlan, weight: TiledWeight, dtype: torch.dtype, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """The first row of each slab of W.T, and the slab, (rows, columns); valid until the next one is asked for."""
    rows = plan.strips * STRIP
    memory = torch.empty(min(rows, weight.N), columns, dtype=dtype, device=weight.words.device)
    for first in range(0, weight.N, rows):
        slab = memory[: weight.N - first]
        kernels("dequantize").dequantize(
            weight.words,
            weight.meta,
            weight.scales,
            slab,
            **_form(problem, weight.dtype),
            first_strip=first // STRIP,
            ptx=problem.capability >= 80,
            pdl=problem.capability >= 90,
        )
        yield first, slab


def _in_order(problem: Problem, x: Tensor, weight: TiledWeight) -> Tensor:
    """x with its columns in the order of the tiles."""
    if weight.order is None:
        return x
    out = torch.empty(len(x), len(weight.order), dtype=x.dtype, device=x.device)
    kernels("gather").gather(x, weight.order, out, pdl=problem.capability >= 90)
    return out


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of kernels, imported when it is needed."""
    try:
        return importlib.import_module(f".kernels.{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("tensors on a GPU need the package triton, which is not installed") from error
