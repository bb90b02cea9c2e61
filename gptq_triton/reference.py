"""Dequantize and matmul in pure PyTorch: the oracle in float64, and the CPU path."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .packing import PackedWeight, unpack, unpack_zeros


def dequantize(weight: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight as floats: ``scales[g] * (codes - zeros[g])``.

    Args:
        weight: The packed weight.
        dtype: Of the result and of the arithmetic, which is never below float32; default: the
            dtype of the scales.

    Returns:
        (K, N), transposed with respect to ``nn.Linear.weight``. The difference of codes is exact,
        so each element is rounded once in the arithmetic and once more if ``dtype`` is narrower.
    """
    dtype = dtype or weight.scales.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spec, K, N = weight.spec, weight.K, weight.N
    zeros = unpack_zeros(weight.qzeros, spec.bits, N, weight.checkpoint_format).to(wide)
    scales = weight.scales.to(wide)
    out = unpack(weight.qweight, spec.bits, K).to(wide)
    if weight.g_idx is not None:
        return out.sub_(zeros[weight.g_idx]).mul_(scales[weight.g_idx]).to(dtype)
    rows = spec.rows_per_group(K)
    full = K // rows
    groups = out[: full * rows].view(full, rows, N)  # whole groups by broadcasting; a short last one apart
    groups.sub_(zeros[:full, None]).mul_(scales[:full, None])
    if full < spec.groups(K):
        out[full * rows :].sub_(zeros[full]).mul_(scales[full])
    return out.to(dtype)


def matmul(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x @ dequantize(weight) + bias`` in the dtype of x.

    Args:
        x: (M, K), floating.
        weight: The packed weight.
        bias: (N,) or None.

    Returns:
        (M, N), the dtype of x. float16 and bfloat16 go through float32 on the CPU, where their
        native products are slow and round more often.
    """
    return product(x, functools.partial(dequantize, weight), bias)


def matmul_transposed(dy: Tensor, weight: PackedWeight) -> Tensor:
    """``dy @ dequantize(weight).T``: the gradient with respect to x.

    Args:
        dy: (M, N), floating.
        weight: The packed weight.

    Returns:
        (M, K), the dtype of dy.
    """
    return product_transposed(dy, functools.partial(dequantize, weight))


def product(x: Tensor, floats: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
    """``x @ W + bias`` in the dtype of x, for a W (K, N) that comes in any dtype."""
    wide = _wide(x)
    y = x.to(wide) @ floats(wide)
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype)


def product_transposed(dy: Tensor, floats: Callable[[torch.dtype], Tensor]) -> Tensor:
    """``dy @ W.T`` in the dtype of dy."""
    wide = _wide(dy)
    return (dy.to(wide) @ floats(wide).t()).to(dy.dtype)


def _wide(x: Tensor) -> torch.dtype:
    if x.is_cuda:  # whose products of halves accumulate in float32
        return x.dtype
    return torch.float64 if x.dtype == torch.float64 else torch.float32
