"""Products with a tiled weight on a GPU: the plan, what it needs, the launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from . import dispatch, tables
from .dispatch import DecodePlan, DequantizePlan, FusedPlan, MatmulPlan, Problem, WidePlan
from .layout import STEP, STRIP, TiledWeight


def product(x: Tensor, bias: Tensor | None, weight: TiledWeight, batch_invariant: bool = False) -> Tensor:
    """``x @ W + bias``, as `ops.matmul` says, without gradients."""
    M, N = x.shape[0], weight.N
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    rows = min(M, dispatch.ROWS_OF_DECODE) if batch_invariant else M
    for first in range(0, M, rows):
        part = x if rows == M else x[first : first + rows]
        _multiply(part, bias, weight, y if rows == M else y[first : first + rows], batch_invariant)
    return y


def _multiply(x: Tensor, bias: Tensor | None, weight: TiledWeight, y: Tensor, batch_invariant: bool) -> None:
    M, K = x.shape
    stride = x.stride(0)
    address = x.data_ptr()
    launch = _launch(
        M,
        K,
        weight.N,
        weight.words.shape[0],
        weight.words.shape[1],
        weight.spec.bits,
        weight.group_columns,
        x.dtype,
        None if bias is None else bias.dtype,
        weight.dtype,
        weight.order is not None,
        address % 16 == 0 and stride % 8 == 0,
        x.get_device(),
        batch_invariant,
    )
    launch(x, address, bias, weight, y)


@dataclass(frozen=True)
class Operands:
    """What the tensors of a product are, as far as a compiled launch depends on it.

    Attributes:
        K: Columns of x.
        N: Columns of y.
        bias: Dtype of the bias, or None.
        scales_bf16: Whether scales are bfloat16, not float16.
        ordered: Whether the weight has an order.
        aligned: Whether rows of x start at multiples of 16 bytes.
    """

    K: int
    N: int
    bias: torch.dtype | None
    scales_bf16: bool
    ordered: bool
    aligned: bool


Launch = Callable[[Tensor, int, "Tensor | None", TiledWeight, Tensor], None]  # x and its address, bias, weight, y


@functools.lru_cache(maxsize=1 << 14)
def _launch(
    M: int,
    K: int,
    N: int,
    strips: int,
    steps: int,
    bits: int,
    group_columns: int,
    dtype: torch.dtype,
    bias: torch.dtype | None,
    scales: torch.dtype,
    ordered: bool,
    aligned: bool,
    device: int,
    batch_invariant: bool,
) -> Launch:
    """Everything about a product that its values do not change."""
    problem = Problem(M, strips, steps, bits, group_columns, dtype, scales != torch.float32, *gpu(device))
    plan = None if batch_invariant else tables.lookup(gpu_name(device), problem)
    plan = plan or dispatch.choose(problem, batch_invariant=batch_invariant)
    operands = Operands(K, N, bias, scales == torch.bfloat16, ordered, aligned)
    if isinstance(plan, DequantizePlan):
        launch = functools.partial(_by_floats, plan, problem)
    else:
        launch = prepare_launch(problem, plan, operands, device)
    if torch.cuda.device_count() == 1:
        return launch

    def guarded(*arguments: Any) -> None:
        with torch.cuda.device(device):
            launch(*arguments)

    return guarded


def forget() -> None:
    """Choose plans anew: the tables have changed."""
    _launch.cache_clear()


def prepare_launch(problem: Problem, plan: FusedPlan, operands: Operands, device: int) -> Launch:
    """Compile a plan for the current stream of a device."""
    if isinstance(plan, MatmulPlan):
        return functools.partial(_matmul, plan, problem, device)
    from .kernels.decode import prepare_decode
    from .kernels.digits import STEPS, prepare_digits
    from .kernels.wide import prepare_wide

    M, strips, steps, split = problem.M, problem.strips, problem.steps, plan.split
    K, subgroups, pdl = operands.K, max(1, 128 // problem.group_columns), problem.capability >= 90
    prepare = prepare_wide if isinstance(plan, WidePlan) else prepare_decode
    multiply = prepare(
        device,
        problem.dtype,
        operands.bias,
        bits=problem.bits,
        scales_bf16=operands.scales_bf16,
        group_columns=problem.group_columns,
        pdl=pdl,
        **asdict(plan),
    )
    rows = 16 if isinstance(plan, WidePlan) else 4 * plan.tiles
    digits_of_x = prepare_digits(
        device,
        problem.dtype,
        ordered=operands.ordered,
        aligned=operands.aligned,
        subgroups=subgroups,
        tiles=0 if isinstance(plan, WidePlan) else plan.tiles,
        rows=rows if isinstance(plan, WidePlan) else 0,
        pdl=pdl,
    )
    programs = -(-strips // plan.strips_of_program)
    # one piece of memory, in words: digits, sums, workspace
    digit_words = steps * rows * 64
    sum_words = steps * 2 * subgroups * (rows if isinstance(plan, WidePlan) else 8 * rows)
    partial_words = split * programs * 16 * plan.strips_of_program * rows if split > 1 else 0
    words = digit_words + sum_words + partial_words
    grid = -(-steps // STEPS)
    scratch = _scratch(device)

    def launch(x: Tensor, address: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        order = weight.order
        with scratch.lock:  # the two launches belong together
            memory, counters = scratch.get(stream, words, programs)
            digits = memory.data_ptr()
            sums = digits + 4 * digit_words
            digits_of_x(
                grid, M, stream,
                address, None if order is None else order.data_ptr(), digits, sums, M, K, steps, x.stride(0),
            )  # fmt: skip
            multiply(
                programs, split, stream,
                digits, sums, weight.words.data_ptr(), weight.meta.data_ptr(),
                None if bias is None else bias.data_ptr(), y.data_ptr(),
                sums + 4 * sum_words if split > 1 else None, counters.data_ptr() if split > 1 else None,
                M, operands.N, steps, strips, y.stride(0),
            )  # fmt: skip

    return launch


def _matmul(
    plan: MatmulPlan,
    problem: Problem,
    device: int,
    x: Tensor,
    address: int,
    bias: Tensor | None,
    weight: TiledWeight,
    y: Tensor,
) -> None:
    from .kernels.matmul import matmul

    x = _in_order(x, weight)
    programs = -(-len(x) // plan.block_m) * -(-problem.strips // plan.strips_of_program)
    scratch = _scratch(device)
    with scratch.lock:
        stream = torch._C._cuda_getCurrentRawStream(device)
        memory, counters = scratch.get(stream, plan.split * len(x) * problem.strips * STRIP, programs)
        workspace = memory.view(torch.float32)
        matmul(
            x,
            weight.words,
            weight.meta,
            weight.scales,
            bias,
            y,
            workspace if plan.split > 1 else None,
            counters if plan.split > 1 else None,
            bits=problem.bits,
            group_columns=problem.group_columns,
            scales_bf16=weight.dtype == torch.bfloat16,
            **asdict(plan),
        )


def _by_floats(
    plan: DequantizePlan,
    problem: Problem,
    x: Tensor,
    address: int,
    bias: Tensor | None,
    weight: TiledWeight,
    y: Tensor,
) -> None:
    x = _in_order(x, weight)
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
    plan = cast(DequantizePlan, dispatch.choose(problem, transposed=True))
    with torch.cuda.device(dy.device):
        if weight.strips <= plan.strips:
            ((_, w),) = _slabs(plan, problem, weight, dy.dtype, columns)
            dx = dy @ w
        else:
            total = torch.zeros(len(dy), columns, dtype=torch.float32, device=dy.device)
            for first, w in _slabs(plan, problem, weight, dy.dtype, columns):
                total += dy[:, first : first + len(w)] @ w
            dx = total.to(dy.dtype)
    if weight.order is None:
        return dx
    return dx[:, weight.inverse_order()]


def _slabs(
    plan: DequantizePlan, problem: Problem, weight: TiledWeight, dtype: torch.dtype, columns: int
) -> Iterator[tuple[int, Tensor]]:
    """The first row of each slab of W.T, and the slab, (rows, columns); valid until the next one is asked for."""
    from .kernels.dequantize import dequantize

    rows = plan.strips * STRIP
    memory = torch.empty(min(rows, weight.N), columns, dtype=dtype, device=weight.words.device)
    for first in range(0, weight.N, rows):
        slab = memory[: weight.N - first]
        dequantize(
            weight.words,
            weight.meta,
            weight.scales,
            slab,
            bits=problem.bits,
            group_columns=problem.group_columns,
            scales_bf16=weight.dtype == torch.bfloat16,
            first_strip=first // STRIP,
            ptx=problem.capability >= 80,
        )
        yield first, slab


def _in_order(x: Tensor, weight: TiledWeight) -> Tensor:
    """x with its columns in the order of the tiles."""
    if weight.order is None:
        return x
    from .kernels.gather import gather

    out = torch.empty(len(x), len(weight.order), dtype=x.dtype, device=x.device)
    gather(x, weight.order, out)
    return out


def problem_of(M: int, dtype: torch.dtype, device: int, weight: TiledWeight) -> Problem:
    half_scales = weight.dtype != torch.float32
    return Problem(
        M, weight.strips, weight.steps, weight.spec.bits, weight.group_columns, dtype, half_scales, *gpu(device)
    )


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


class _Scratch:
    """Memory of a GPU that outlives a launch.

    Launches of one stream follow each other, so they share it. A captured launch may be replayed on any stream, beside
    anything: it has scratch memory of its graph's and counters of its own for ever.
    """

    COUNTERS = 1 << 14
    CAPTURED = 1 << 21

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.words: dict[int, Tensor] = {}
        self.zeros: dict[int, Tensor] = {}
        self.captured = torch.zeros(self.CAPTURED, dtype=torch.int32, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()
        self.used = 0
        self.lock = threading.Lock()

    def get(self, stream: int, words: int, counters: int) -> tuple[Tensor, Tensor]:
        """At least so many uninitialized words, and zeroed counters, which the kernel leaves at zero."""
        if torch.cuda.is_current_stream_capturing():
            memory = torch.empty(words, dtype=torch.int32, device=self.device)
            if self.used + counters > self.CAPTURED:  # rare: zeroed by every replay
                return memory, torch.zeros(counters, dtype=torch.int32, device=self.device)
            self.used += counters
            return memory, self.captured[self.used - counters : self.used]
        memory = self.words.get(stream)
        if memory is None or len(memory) < words:
            memory = self.words[stream] = torch.empty(words, dtype=torch.int32, device=self.device)
        zeros = self.zeros.get(stream)
        if zeros is None or len(zeros) < counters:
            zeros = self.zeros[stream] = torch.zeros(
                max(counters, self.COUNTERS), dtype=torch.int32, device=self.device
            )
        return memory, zeros


def reserve(device: int) -> None:
    """Allocate what cannot be allocated while a CUDA graph is captured."""
    _scratch(device)


@functools.cache
def _scratch(device: int) -> _Scratch:
    return _Scratch(device)
