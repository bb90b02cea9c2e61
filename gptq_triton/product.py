"""Products with a tiled weight on a GPU: the plan, what it needs, the launch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from . import dispatch
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
    call = _call(
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
    if call is None:
        _by_floats(x, bias, weight, y)
    else:
        call(address, stride, bias, weight, y)


@functools.lru_cache(maxsize=1 << 14)
def _call(
    M: int,
    K: int,
    N: int,
    strips: int,
    steps: int,
    bits: int,
    group_columns: int,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    scale_dtype: torch.dtype,
    ordered: bool,
    aligned: bool,
    device: int,
    batch_invariant: bool,
) -> Callable[[int, int, Tensor | None, TiledWeight, Tensor], None] | None:
    """Everything about a product that its tensors do not change; None where W goes through floats."""
    arch, multiprocessors = gpu(device)
    half_scales = scale_dtype != torch.float32
    problem = Problem(M, strips, steps, bits, group_columns, dtype, half_scales, arch, multiprocessors)
    plan = dispatch.choose(problem, batch_invariant=batch_invariant)
    if isinstance(plan, DequantizePlan):
        return None
    from .kernels.decode import prepare_decode
    from .kernels.digits import STEPS, prepare_digits
    from .kernels.wide import prepare_wide

    subgroups = max(1, 128 // group_columns)
    pdl = problem.capability >= 90
    programs = -(-strips // plan.strips_of_program)
    common = {"bits": bits, "scales_bf16": scale_dtype == torch.bfloat16, "group_columns": group_columns, "pdl": pdl}
    if isinstance(plan, WidePlan):
        tiles, rows = 0, plan.block_m
        main = prepare_wide(device, dtype, bias_dtype, **common, **asdict(plan))
    else:
        tiles, rows = plan.tiles, 4 * plan.tiles
        main = prepare_decode(device, dtype, bias_dtype, **common, **asdict(plan))
    split_x = prepare_digits(
        device,
        dtype,
        ordered=ordered,
        aligned=aligned,
        subgroups=subgroups,
        tiles=tiles,
        rows=rows if isinstance(plan, WidePlan) else 0,
        pdl=pdl,
    )
    # one allocation, in words: digits, sums, workspace
    digit_words = steps * rows * 64
    sum_words = steps * 2 * subgroups * (rows if isinstance(plan, WidePlan) else 32 * tiles)
    partial_words = plan.split * programs * 16 * plan.strips_of_program * rows if plan.split > 1 else 0
    if plan.split > 1 and not torch.cuda.is_current_stream_capturing():
        _counters_of(device)  # while memory may be zeroed for good
    grid_x = -(-steps // STEPS)
    split = plan.split
    where = torch.device("cuda", device)

    def call(x: int, stride_x: int, bias: Tensor | None, weight: TiledWeight, y: Tensor) -> None:
        scratch = torch.empty(digit_words + sum_words + partial_words, dtype=torch.int32, device=where)
        digits = scratch.data_ptr()
        sums = digits + 4 * digit_words
        stream = torch._C._cuda_getCurrentRawStream(device)
        order = weight.order
        split_x(
            grid_x, M, stream,
            x, None if order is None else order.data_ptr(), digits, sums, M, K, steps, stride_x,
        )  # fmt: skip
        main(
            programs, split, stream,
            digits, sums, weight.words.data_ptr(), weight.meta.data_ptr(), None if bias is None else bias.data_ptr(),
            y.data_ptr(), sums + 4 * sum_words if split > 1 else None,
            counters(device, stream, programs) if split > 1 else None,
            M, N, steps, strips, y.stride(0),
        )  # fmt: skip

    if torch.cuda.device_count() == 1:
        return call

    def guarded(*arguments: Any) -> None:
        with torch.cuda.device(device):
            call(*arguments)

    return guarded


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


class _Counters:
    """Zeros that kernels leave at zero: launches of one stream follow each other and share them."""

    SIZE = 1 << 14
    CAPTURED = 1 << 21

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)
        self.streams: dict[int, Tensor] = {}
        # a captured launch keeps its own for ever: graphs may be replayed on any stream, beside anything
        self.captured = torch.zeros(self.CAPTURED, dtype=torch.int32, device=self.device)
        torch.cuda.current_stream(self.device).synchronize()
        self.used = 0

    def of_stream(self, stream: int) -> int:
        if stream not in self.streams:
            self.streams[stream] = torch.zeros(self.SIZE, dtype=torch.int32, device=self.device)
        return self.streams[stream].data_ptr()

    def of_capture(self, count: int) -> int:
        if self.used + count > self.CAPTURED:  # rare: zeroed by every replay
            return torch.zeros(count, dtype=torch.int32, device=self.device).data_ptr()
        self.used += count
        return self.captured.data_ptr() + 4 * (self.used - count)


@functools.cache
def _counters_of(device: int) -> _Counters:
    return _Counters(device)


def counters(device: int, stream: int, count: int) -> int:
    """The address of ``count`` int32 zeros for a launch on this stream."""
    if torch.cuda.is_current_stream_capturing():
        return _counters_of(device).of_capture(count)
    if count > _Counters.SIZE:
        return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", device)).data_ptr()
    return _counters_of(device).of_stream(stream)
