"""Kernels compiled for given constants, then launched without the look-ups of Triton's JIT.

The JIT types and hashes every argument of every launch: about 50 us for a Gluon kernel, and a user without CUDA graphs
waits for it. Kernels that are launched here specialize on no argument, so constants and dtypes tell which one is meant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Launch = Callable[..., None]


class Address(NamedTuple):
    """What a launch reads of a tensor that a descriptor describes."""

    address: int

    def data_ptr(self) -> int:
        """Of its first element."""
        return self.address


class Map(NamedTuple):
    """What a launch reads of a tensor descriptor; making one takes a tenth of the time."""

    base: Tensor | Address
    shape: list[int]
    strides: list[int]
    padding: str = "zero"
    round_f32_to_tf32: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Map:
        """The whole of a tensor."""
        return cls(tensor, list(tensor.shape), list(tensor.stride()))


def prepare(
    kernel: Any,
    device: int,
    pointers: tuple[Any, ...],
    constants: dict[str, Any],
    **options: Any,
) -> Launch:
    """Compile for a device.

    Args:
        kernel: A jitted function whose parameters are pointers, then 32-bit integers, then constants.
        device: Index of the GPU.
        pointers: The dtype each points to; None where a tensor is absent; a descriptor of tensors where it is one.
        constants: By name.
        options: Of the launch: num_warps, num_stages, launch_pdl.

    Returns:
        ``launch(grid_x, grid_y, stream, *pointers, *integers)``; a pointer is an address, or None, or
        a `Map` for a descriptor.
    """
    integers = len(kernel.arg_names) - len(pointers) - len(constants)
    with torch.cuda.device(device):
        binary = kernel.warmup(*pointers, *[3] * integers, **constants, **options, grid=(1,))
        run, function, metadata = binary.run, binary.function, binary.packed_metadata
    rest = (None,) * len(constants)  # constants have their places among the arguments, and are not read

    def launch(grid_x: int, grid_y: int, stream: int, *arguments: int | Map | None) -> None:
        run(grid_x, grid_y, 1, stream, function, metadata, None, None, None, *arguments, *rest)

    return launch


def run(
    kernel: Any,
    grid: tuple[int, int],
    pointers: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: dict[str, Any],
    **options: Any,
) -> None:
    """Launch on the current stream of the first pointer's device.

    Args:
        kernel: As `prepare` takes it.
        grid: Programs.
        pointers: What its first parameters are; None where a tensor is absent.
        integers: What follows.
        constants: By name.
        options: Of the launch.
    """
    place = next(tensor for tensor in pointers if tensor is not None)
    if not place.is_cuda:  # Triton's interpreter
        kernel[grid](*pointers, *integers, **constants, **options)
        return
    device = place.get_device()
    dtypes = tuple(None if tensor is None else tensor.dtype for tensor in pointers)
    launch = _kept(kernel, device, dtypes, tuple(constants.items()), tuple(options.items()))
    with torch.cuda.device(device):
        stream = torch._C._cuda_getCurrentRawStream(device)
        launch(*grid, stream, *[None if tensor is None else tensor.data_ptr() for tensor in pointers], *integers)


@functools.cache
def _kept(
    kernel: Any,
    device: int,
    dtypes: tuple[Any, ...],
    constants: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
) -> Launch:
    return prepare(kernel, device, dtypes, dict(constants), **dict(options))
