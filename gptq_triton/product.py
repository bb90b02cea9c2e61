"""Products with a tiled weight on a GPU: the plan, what it needs, the launch."""

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

from . import dispatch, tables
from .halves import add_product
from .layout import STEP, STRIP, TiledWeight
from .plans import (
    DecodePlan,
    DequantizePlan,
    LargePlan,
    MatmulPlan,
    Plan,
    Problem,
    TransposedPlan,
    WidePlan,
)
from .scratch import scratch_of


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
    xs, ys = x.view(M, K) if x.dim() != 2 else x, y.view(M, weight.N)
    for first in range(0, M, rows):
        part = xs[first : first + rows]
        launch = _launch(weight, len(part), stride, part, bias, batch_invariant)
        launch(part, stride, bias, weight, ys[first : first + rows])
    return y


# x, contiguous but for its row stride; that stride; the bias; the weight; contiguous y
Launch = Callable[[Tensor, int, "Tensor | None", TiledWeight, Tensor], None]


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


@functools.lru_cache(maxsize=1 << 12)
def _prepared(problem: Problem, operands: Operands, device: int, batch_invariant: bool) -> Launch:
    return prepare_launch(problem, plan_of(problem, device, batch_invariant), operands, device)


def plan_of(problem: Problem, device: int, batch_invariant: bool = False) -> Plan:
    """How ``x @ W`` is computed: as a table of measured plans says, else as estimated."""
    plan = None if batch_invariant else tables.lookup(gpu_name(device), problem)
    return plan or dispatch.choose(problem, batch_invariant=batch_invariant)


def forget() -> None:
    """Choose plans anew: the tables have changed."""
    _prepared.cache_clear()


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
    multiply = _kernels("decode").prepare_decode(
        device,
        problem.dtype,
        operands.bias,
        **_form(problem, operands.scales),
        pdl=problem.capability >= 90,
        own_rows=M,
        aligned=operands.paired,
        **tiles,
    )
    words, counters = _meeting(problem, plan)
    scratch = scratch_of(device)

    def launch(x: Tensor, stride: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        partial, zeros = scratch.get(stream, words, counters) if counters else (None, None)
        multiply(
            *grid, stream,
            x.data_ptr(), None, None,
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
    multiply = (_kernels("wide").prepare_wide if wide else _kernels("decode").prepare_decode)(
        device,
        problem.dtype,
        operands.bias,
        **_form(problem, operands.scales),
        pdl=pdl,
        **chosen,
    )
    digits_of_x = _kernels("digits").prepare_digits(
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
                *grid, stream, None,
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
        _kernels("matmul").matmul(
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
    multiply = _kernels("large").prepare_large(
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
    for first, w in _slabs(plan, problem, weight, x.dtype, x.shape[1]):
        part = y[:, first : first + len(w)]
        if bias is None:
            torch.mm(x, w.t(), out=part)
        else:
            torch.addmm(bias[first : first + len(w)].to(x.dtype), x, w.t(), out=part)


def product_transposed(dy: Tensor, weight: TiledWeight) -> Tensor:
    """``dy @ W.T``, as `ops.matmul_transposed` says, without gradients."""
    columns = weight.K if weight.order is None else weight.steps * STEP
    problem = problem_of(len(dy), dy.dtype, dy.get_device(), weight)
    plan = dispatch.choose_transposed(problem, aligned=weight.N % 8 == columns % 8 == 0)
    with torch.cuda.device(dy.device):
        if isinstance(plan, TransposedPlan):
            dx = _by_tiles(plan, problem, dy, weight, columns)
        else:
            dx = _by_slabs(plan, problem, dy, weight, columns)
    if weight.order is None:
        return dx
    return dx[:, weight.inverse_order()]


def _by_tiles(plan: TransposedPlan, problem: Problem, dy: Tensor, weight: TiledWeight, columns: int) -> Tensor:
    device = dy.get_device()
    if dy.stride(1) != 1 or dy.stride(0) % 8 or dy.data_ptr() % 16:
        dy = dy.clone(memory_format=torch.contiguous_format)
    dx = torch.empty(len(dy), columns, dtype=dy.dtype, device=dy.device)
    multiply = _kernels("transposed").prepare_transposed(
        device,
        dy.dtype,
        **_form(problem, weight.dtype),
        block_m=plan.block_m,
        stages=plan.stages,
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
    return dx


@_sums_of_floats()
def _by_slabs(plan: DequantizePlan, problem: Problem, dy: Tensor, weight: TiledWeight, columns: int) -> Tensor:
    if weight.strips <= plan.strips:
        ((_, w),) = _slabs(plan, problem, weight, dy.dtype, columns)
        return dy @ w
    total = torch.zeros(len(dy), columns, dtype=torch.float32, device=dy.device)
    for first, w in _slabs(plan, problem, weight, dy.dtype, columns):
        add_product(total, dy[:, first : first + len(w)], w)
    return total.to(dy.dtype)


def _slabs(
    plan: DequantizePlan, problem: Problem, weight: TiledWeight, dtype: torch.dtype, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """The first row of each slab of W.T, and the slab, (rows, columns); valid until the next one is asked for."""
    rows = plan.strips * STRIP
    memory = torch.empty(min(rows, weight.N), columns, dtype=dtype, device=weight.words.device)
    for first in range(0, weight.N, rows):
        slab = memory[: weight.N - first]
        _kernels("dequantize").dequantize(
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
    _kernels("gather").gather(x, weight.order, out, pdl=problem.capability >= 90)
    return out


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
def _kernels(name: str) -> ModuleType:
    try:
        return importlib.import_module(f".kernels.{name}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("tensors on a GPU need the package triton, which is not installed") from error


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
