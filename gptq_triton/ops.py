"""``x @ W`` and ``dy @ W.T`` as torch operators: reference or kernels, gradients, fakes.

A packed weight (checkpoint form) is multiplied by the reference on any device, a tiled weight by the kernels of its
GPU. All operators are opaque to torch.compile, so the choice of a kernel may depend on M without a recompilation, and
an operator and its transpose are each other's derivative. Importing this module touches no GPU and no kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .layout import TiledWeight, dequantize_tiles
from .packing import PackedWeight
from .product import product, product_transposed
from .spec import QuantSpec

_PACKED = (
    "Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, "
    "int bits, int group_size, SymInt K, str checkpoint_format"
)
_TILED = (
    "Tensor words, Tensor meta, Tensor? scales, Tensor? order, "
    "int bits, int group_columns, SymInt K, SymInt N, ScalarType dtype, bool batch_invariant"
)
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# define and impl cost less per call than torch.library.custom_op: 9 against 12 us on one CPU
_library = torch.library.Library("gptq_triton", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(f"matmul(Tensor x, Tensor? bias, {_PACKED}) -> Tensor", tags=_TAGS)
_library.define(f"matmul_transposed(Tensor dy, {_PACKED}) -> Tensor", tags=_TAGS)
_library.define(f"tiled_matmul(Tensor x, Tensor? bias, {_TILED}) -> Tensor", tags=_TAGS)
_library.define(f"tiled_matmul_transposed(Tensor dy, {_TILED}) -> Tensor", tags=_TAGS)


def matmul(
    x: Tensor, weight: PackedWeight | TiledWeight, bias: Tensor | None = None, *, batch_invariant: bool = False
) -> Tensor:
    """``x @ W + bias``, accumulated in float32 (float64 for float64).

    Differentiable in x and bias; the weight is frozen. Tensors whose last dimension is not dense are copied first.

    Args:
        x: (M, K), float16, bfloat16 or float32 (float64 too on the CPU), any strides.
        weight: On the device of x. Tiled, it is multiplied by kernels; packed, by the reference.
        bias: (N,), floating, or None.
        batch_invariant: On a GPU, tiled: a row of the result has the same bits whatever M is and other rows hold.

    Returns:
        (M, N), the dtype of x.

    Raises:
        ValueError: A shape does not fit, or a tensor is on another device.
        TypeError: The dtype of x or bias has no kernel.
    """
    _check_rows("x", x, weight.K)
    _check_devices("x", x, weight)
    if bias is not None:
        if tuple(bias.shape) != (weight.N,):
            raise ValueError(f"bias must have shape {(weight.N,)}, got {tuple(bias.shape)}")
        if not bias.is_floating_point():
            raise TypeError(f"bias must be floating, got {bias.dtype}")
        if bias.device != x.device:
            raise ValueError(f"bias must be on the device of x, {x.device}, got {bias.device}")
    if isinstance(weight, TiledWeight):
        if plain(x, weight, bias):
            return product(x, bias, weight, batch_invariant)
        return torch.ops.gptq_triton.tiled_matmul.default(x, bias, *_tiled_parts(weight), batch_invariant)
    return torch.ops.gptq_triton.matmul.default(x, bias, *_parts(weight))


def matmul_transposed(dy: Tensor, weight: PackedWeight | TiledWeight) -> Tensor:
    """``dy @ W.T``, accumulated in float32 (float64 for float64): the gradient with respect to x.

    Differentiable in dy.

    Args:
        dy: (M, N), float16, bfloat16 or float32 (float64 too on the CPU), any strides.
        weight: On the device of dy.

    Returns:
        (M, K), the dtype of dy.

    Raises:
        ValueError: A shape does not fit, or a tensor is on another device.
        TypeError: The dtype of dy has no kernel.
    """
    _check_rows("dy", dy, weight.N)
    _check_devices("dy", dy, weight)
    if isinstance(weight, TiledWeight):
        return torch.ops.gptq_triton.tiled_matmul_transposed.default(dy, *_tiled_parts(weight), False)
    return torch.ops.gptq_triton.matmul_transposed.default(dy, *_parts(weight))


def plain(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> bool:
    """Whether kernels may be launched without the dispatcher's overhead: good inputs on a GPU, and nothing listens."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in _KERNEL_DTYPES
        and x.dim() > 0
        and x.size(-1) == weight.K
        and x.get_device() == weight.words.get_device() >= 0
        and not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        and not torch.is_autocast_enabled("cuda")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def _parts(weight: PackedWeight) -> tuple[Any, ...]:
    """The weight as the operators take it."""
    spec = weight.spec
    return (
        weight.qweight,
        weight.scales,
        weight.qzeros,
        weight.g_idx,
        spec.bits,
        spec.group_size,
        weight.K,
        weight.checkpoint_format,
    )


def _whole(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    K: int,
    checkpoint_format: str,
) -> PackedWeight:
    """The inverse of :func:`_parts`."""
    spec = QuantSpec(bits, group_size, desc_act=g_idx is not None)
    return PackedWeight(qweight, scales, qzeros, g_idx, spec, K, checkpoint_format)


def _tiled_parts(weight: TiledWeight) -> tuple[Any, ...]:
    """The weight as the operators take it, but for the last argument."""
    return (
        weight.words,
        weight.meta,
        weight.scales,
        weight.order,
        weight.spec.bits,
        weight.group_columns,
        weight.K,
        weight.N,
        weight.dtype,
    )


def _tiled_whole(
    words: Tensor,
    meta: Tensor,
    scales: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_columns: int,
    K: int,
    N: int,
    dtype: torch.dtype,
) -> TiledWeight:
    """The inverse of :func:`_tiled_parts`, as far as products depend on it."""
    return TiledWeight(words, meta, scales, order, group_columns, QuantSpec(bits), K, N, dtype)


def _check_rows(field: str, x: Tensor, features: int) -> None:
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{field} must have shape (M, {features}), got {tuple(x.shape)}")
    if x.dtype not in _KERNEL_DTYPES:
        if x.dtype != torch.float64:
            raise TypeError(f"{field} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device.type != "cpu":
            raise TypeError(f"{field} may be float64 on the CPU only, got a tensor on {x.device}")


def _check_devices(field: str, x: Tensor, weight: PackedWeight | TiledWeight) -> None:
    device = x.device
    names = ("words", "meta") if isinstance(weight, TiledWeight) else ("qweight", "scales", "qzeros", "g_idx")
    for name in names:
        tensor = getattr(weight, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on the device of {field}, {device}, got {tensor.device}")


def _matmul(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return reference.matmul(x, _whole(*parts), bias)


def _matmul_transposed(dy: Tensor, *parts: Any) -> Tensor:
    return reference.matmul_transposed(dy, _whole(*parts))


def _tiled_matmul_cpu(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return reference.product(x, functools.partial(dequantize_tiles, _tiled_whole(*parts[:-1])), bias)


def _tiled_matmul_transposed_cpu(dy: Tensor, *parts: Any) -> Tensor:
    return reference.product_transposed(dy, functools.partial(dequantize_tiles, _tiled_whole(*parts[:-1])))


def _tiled_matmul_gpu(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return product(x, bias, _tiled_whole(*parts[:-1]), parts[-1])


def _tiled_matmul_transposed_gpu(dy: Tensor, *parts: Any) -> Tensor:
    return product_transposed(dy, _tiled_whole(*parts[:-1]))


def _matmul_fake(x: Tensor, bias: Tensor | None, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[1]))


def _tiled_matmul_fake(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return x.new_empty((x.shape[0], parts[7]))


def _transposed_fake(dy: Tensor, *parts: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], parts[6]))


def _save(ctx: Any, parts: Sequence[Any]) -> None:
    for tensor in parts[:4]:
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError("scales must not require grad: the weight is frozen and has no gradient")
    ctx.save_for_backward(*parts[:4])
    ctx.numbers = parts[4:]


def _derive(
    forward: Any, transposed: Any
) -> tuple[Callable[..., None], Callable[..., Any], Callable[..., None], Callable[..., Any]]:
    """Set-up and backward of an operator, then of its transpose."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, *parts = inputs
        _save(ctx, parts)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = transposed.default(dy, *ctx.saved_tensors, *ctx.numbers)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, ctx.bias_dtype)).to(ctx.bias_dtype)
        return dx, dbias, *([None] * (4 + len(ctx.numbers)))

    def transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs[1:])

    def transposed_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        ddy = forward.default(ddx, None, *ctx.saved_tensors, *ctx.numbers)
        return ddy, *([None] * (4 + len(ctx.numbers)))

    return setup, backward, transposed_setup, transposed_backward


def _register(
    name: str,
    cpu: Callable[..., Tensor],
    gpu: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    _library.impl(name, cpu, "CPU")
    _library.impl(name, gpu, "CUDA")  # ROCm devices too
    qualified = f"gptq_triton::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)


_a, _b, _c, _d = _derive(torch.ops.gptq_triton.matmul, torch.ops.gptq_triton.matmul_transposed)
_register("matmul", _matmul, _matmul, _matmul_fake, _a, _b)
_register("matmul_transposed", _matmul_transposed, _matmul_transposed, _transposed_fake, _c, _d)
_a, _b, _c, _d = _derive(torch.ops.gptq_triton.tiled_matmul, torch.ops.gptq_triton.tiled_matmul_transposed)
_register("tiled_matmul", _tiled_matmul_cpu, _tiled_matmul_gpu, _tiled_matmul_fake, _a, _b)
_register(
    "tiled_matmul_transposed", _tiled_matmul_transposed_cpu, _tiled_matmul_transposed_gpu, _transposed_fake, _c, _d
)
