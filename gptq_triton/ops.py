"""``x @ W`` and ``dy @ W.T`` as torch operators: CPU by reference, GPU by kernel, gradients, fakes.

Both operators are opaque to torch.compile, so the choice of a kernel may depend on M without a
recompilation, and each is the other's derivative, so gradients of any order exist. Importing this
module touches no GPU and no kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import choose
from .packing import PackedWeight
from .spec import QuantSpec

_WEIGHT = (
    "Tensor qweight, Tensor scales, Tensor qzeros, Tensor? g_idx, "
    "int bits, int group_size, SymInt K, str checkpoint_format"
)
# define and impl cost less per call than torch.library.custom_op: 9 against 12 us on one CPU
_library = torch.library.Library("gptq_triton", "DEF")
_library.define(f"matmul(Tensor x, Tensor? bias, {_WEIGHT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(f"matmul_transposed(Tensor dy, {_WEIGHT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ W + bias``, accumulated in float32 (float64 for float64).

    Differentiable in x and bias; the weight is frozen. Tensors whose last dimension is not dense
    are copied first.

    Args:
        x: (M, K), float16, bfloat16 or float32 (float64 too on the CPU), any strides.
        weight: The packed weight, on the device of x.
        bias: (N,), floating, or None.

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
    return torch.ops.gptq_triton.matmul.default(x, bias, *_parts(weight))


def matmul_transposed(dy: Tensor, weight: PackedWeight) -> Tensor:
    """``dy @ W.T``, accumulated in float32 (float64 for float64): the gradient with respect to x.

    Differentiable in dy.

    Args:
        dy: (M, N), float16, bfloat16 or float32 (float64 too on the CPU), any strides.
        weight: The packed weight, on the device of dy.

    Returns:
        (M, K), the dtype of dy.

    Raises:
        ValueError: A shape does not fit, or a tensor is on another device.
        TypeError: The dtype of dy has no kernel.
    """
    _check_rows("dy", dy, weight.N)
    _check_devices("dy", dy, weight)
    return torch.ops.gptq_triton.matmul_transposed.default(dy, *_parts(weight))


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


def _check_rows(field: str, x: Tensor, features: int) -> None:
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{field} must have shape (M, {features}), got {tuple(x.shape)}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        if x.dtype != torch.float64:
            raise TypeError(f"{field} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.device.type != "cpu":
            raise TypeError(f"{field} may be float64 on the CPU only, got a tensor on {x.device}")


def _check_devices(field: str, x: Tensor, weight: PackedWeight) -> None:
    device = x.device
    for name in ("qweight", "scales", "qzeros", "g_idx"):
        tensor = getattr(weight, name)
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on the device of {field}, {device}, got {tensor.device}")


def _matmul_cpu(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    return reference.matmul(x, _whole(*parts), bias)


def _matmul_transposed_cpu(dy: Tensor, *parts: Any) -> Tensor:
    return reference.matmul_transposed(dy, _whole(*parts))


def _matmul_gpu(x: Tensor, bias: Tensor | None, *parts: Any) -> Tensor:
    weight = _whole(*parts)
    y = torch.empty((x.shape[0], weight.N), dtype=x.dtype, device=x.device)
    _launch(x, weight, (bias if bias is None else _dense(bias), y), transposed=False)
    return y


def _matmul_transposed_gpu(dy: Tensor, *parts: Any) -> Tensor:
    weight = _whole(*parts)
    dx = torch.empty((dy.shape[0], weight.K), dtype=dy.dtype, device=dy.device)
    _launch(dy, weight, (dx,), transposed=True)
    return dx


def _launch(x: Tensor, weight: PackedWeight, rest: Sequence[Tensor | None], *, transposed: bool) -> None:
    """Run the kernel that dispatch picks; the last of ``rest`` is the output."""
    M, N, K, spec = x.shape[0], weight.N, weight.K, weight.spec
    if M == 0:
        return
    plan = choose(M, N, K, spec, x.dtype, _arch(x.device), transposed=transposed)
    launch = _launcher(plan.kernel)
    with torch.cuda.device(x.device):
        launch(
            _dense(x),
            _dense(weight.qweight),
            _dense(weight.scales),
            _dense(weight.qzeros),
            None if weight.g_idx is None else _dense(weight.g_idx),
            *rest,
            bits=spec.bits,
            zero_offset=weight.zero_offset,
            rows_per_group=spec.rows_per_group(K),
            block_m=plan.block_m,
            block_n=plan.block_n,
            block_k=plan.block_k,
            num_warps=plan.num_warps,
            num_stages=plan.num_stages,
        )


def _dense(tensor: Tensor) -> Tensor:
    """Unit stride along the last dimension, copied only if need be."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@functools.cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _launcher(kernel: str) -> Callable[..., None]:
    try:
        module = importlib.import_module(f".kernels.{kernel}", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("tensors on a GPU need the package triton, which is not installed") from error
    return getattr(module, kernel)


def _matmul_fake(x: Tensor, bias: Tensor | None, qweight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], qweight.shape[1]))


def _matmul_transposed_fake(dy: Tensor, *parts: Any) -> Tensor:
    return dy.new_empty((dy.shape[0], parts[6]))


def _save(ctx: Any, parts: Sequence[Any]) -> None:
    if parts[1].requires_grad:
        raise RuntimeError("scales must not require grad: the weight is frozen and has no gradient")
    ctx.save_for_backward(*parts[:4])
    ctx.numbers = parts[4:]


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, bias, *parts = inputs
    _save(ctx, parts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.gptq_triton.matmul_transposed.default(dy, *ctx.saved_tensors, *ctx.numbers)
    if ctx.needs_input_grad[1]:
        dbias = dy.sum(0, dtype=torch.promote_types(dy.dtype, ctx.bias_dtype)).to(ctx.bias_dtype)
    return dx, dbias, *([None] * 8)


def _matmul_transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[1:])


def _matmul_transposed_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    ddy = torch.ops.gptq_triton.matmul.default(ddx, None, *ctx.saved_tensors, *ctx.numbers)
    return ddy, *([None] * 8)


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


_register("matmul", _matmul_cpu, _matmul_gpu, _matmul_fake, _matmul_setup, _matmul_backward)
_register(
    "matmul_transposed",
    _matmul_transposed_cpu,
    _matmul_transposed_gpu,
    _matmul_transposed_fake,
    _matmul_transposed_setup,
    _matmul_transposed_backward,
)
