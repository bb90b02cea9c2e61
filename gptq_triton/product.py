"""Products with a tiled weight on a GPU: the plan, what it needs, the launch."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, tables
from .dispatch import DecodePlan, DequantizePlan, Problem, WidePlan
from .layout import TiledWeight, dequantize_tiles


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
    if launch is None:
        _by_floats(x, bias, weight, y)
    else:
        launch(address, stride, bias, weight, y)


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


Launch = Callable[[int, int, "Tensor | None", TiledWeight, Tensor], None]


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
) -> Launch | None:
    """Everything about a product that its values do not change; None where W goes through floats."""
    problem = Problem(M, strips, steps, bits, group_columns, dtype, scales != torch.float32, *gpu(device))
    plan = None if batch_invariant else tables.lookup(gpu_name(device), problem)
    plan = plan or dispatch.choose(problem, batch_invariant=batch_invariant)
    if isinstance(plan, DequantizePlan):
        return None
    operands = Operands(K, N, bias, scales == torch.bfloat16, ordered, aligned)
    launch = prepare_launch(problem, plan, operands, device)
    if torch.cuda.device_count() == 1:
        return launch

    def guarded(*arguments: Any) -> None:
        with torch.cuda.device(device):
            launch(*arguments)

    return guarded


def prepare_launch(problem: Problem, plan: DecodePlan | WidePlan, operands: Operands, device: int) -> Launch:
    """Compile a plan.

    Returns:
        ``launch(address of x, its row stride, bias, weight, y)``, on the current stream of the device.
    """
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
    rows = plan.block_m if isinstance(plan, WidePlan) else 4 * plan.tiles
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

    def launch(x: int, stride_x: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        order = weight.order
        with scratch.lock:  # the two launches belong together
            digits, counters = scratch.get(stream, words, programs)
            sums = digits + 4 * digit_words
            digits_of_x(
                grid, M, stream,
                x, None if order is None else order.data_ptr(), digits, sums, M, K, steps, stride_x,
            )  # fmt: skip
            multiply(
                programs, split, stream,
                digits, sums, weight.words.data_ptr(), weight.meta.data_ptr(),
                None if bias is None else bias.data_ptr(), y.data_ptr(),
                sums + 4 * sum_words if split > 1 else None, counters if split > 1 else None,
                M, operands.N, steps, strips, y.stride(0),
            )  # fmt: skip

    return launch


def _by_floats(x: Tensor, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
    w = dequantize_tiles(weight, x.dtype)
    torch.mm(x, w, out=y) if bias is None else torch.addmm(bias.to(x.dtype), x, w, out=y)


def product_transposed(dy: Tensor, weight: TiledWeight) -> Tensor:
    """``dy @ W.T``, as `ops.matmul_transposed` says, without gradients."""
    return dy @ dequantize_tiles(weight, dy.dtype).t()


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

    def get(self, stream: int, words: int, counters: int) -> tuple[int, int]:
        """Addresses of uninitialized words and of zeroed counters, which the kernel leaves at zero."""
        if torch.cuda.is_current_stream_capturing():
            memory = torch.empty(words, dtype=torch.int32, device=self.device)
            if self.used + counters > self.CAPTURED:  # rare: zeroed by every replay
                return memory.data_ptr(), torch.zeros(counters, dtype=torch.int32, device=self.device).data_ptr()
            self.used += counters
            return memory.data_ptr(), self.captured.data_ptr() + 4 * (self.used - counters)
        memory = self.words.get(stream)
        if memory is None or len(memory) < words:
            memory = self.words[stream] = torch.empty(words, dtype=torch.int32, device=self.device)
        zeros = self.zeros.get(stream)
        if zeros is None or len(zeros) < counters:
            zeros = self.zeros[stream] = torch.zeros(
                max(counters, self.COUNTERS), dtype=torch.int32, device=self.device
            )
        return memory.data_ptr(), zeros.data_ptr()


def reserve(device: int) -> None:
    """Allocate what cannot be allocated while a CUDA graph is captured."""
    _scratch(device)


@functools.cache
def _scratch(device: int) -> _Scratch:
    return _Scratch(device)
