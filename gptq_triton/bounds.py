"""How far a product may be from the one in float64: the error contract, element by element.

``docs/numerics.md`` derives it in prose. It bounds every kernel and the CPU path alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import ROWS_OF_DIGITS
from .packing import PackedWeight


def coefficients(dtype: torch.dtype, scale_dtype: torch.dtype, bits: int) -> tuple[float, float]:
    """e and c of :func:`error_bound`: the relative error of a weight, and of one addition.

    Args:
        dtype: Of x.
        scale_dtype: Of the scales.
        bits: Width of a code.
    """
    half, u_wide = _is_half(dtype), _accumulation(dtype)
    exact_scale = 2.0 ** -(DIGITS[scale_dtype] + bits) >= u_wide
    e = (0.0 if exact_scale else u_wide) + (unit_roundoff(dtype) * (1 + unit_roundoff(dtype)) if half else 0.0)
    return e, 2.5 * u_wide if half else u_wide


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def _accumulation(dtype: torch.dtype) -> float:
    """The unit roundoff of what sums are kept in."""
    return unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)


def oracle(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """The product in float64."""
    if transposed:
        return reference.matmul_transposed(x.double(), weight)
    return reference.matmul(x.double(), weight, None if bias is None else bias.double())


DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # of the significand, in bits


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return 2.0 ** -DIGITS[dtype]


def error_bound(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    digits: bool | None = None,
) -> Tensor:
    """How far each element of a product may be from the oracle.

    With u the unit roundoff of the dtype of x, t half its smallest number, u32 and so on alike, the
    sum over k of n terms, d = code - zero (exact), w = scale * d:

    1. ``fl32(scale * d)`` is exact if the digits of scale and the bits of d fit float32's 24, else
       off by u32 |w|. Rounding it to the dtype of x adds u |w| + t (nothing for float32), and
       u^2 |w| more where a float16 scale is the sum of two bfloat16. In all
       ``|w' - w| <= e |w| + t``.
    2. Products x w' are exact in a tensor core and fused in an FMA. float32 rounds each of the n
       additions by u32 of at most S = sum |x| |w'|. Tensor cores add blocks of 8 or 16 terms to the
       sum, each cut (not rounded) at 2 u32 of the largest, and cut the result: at most
       (8 + 2) / 8 * 2 u32 a term. So the sum is off by ``n c S`` with c = u32 or 2.5 u32, one more
       where products are rounded too, to first order; (1 + n c) covers the rest.
    3. Adding the bias in float32 rounds once more: u32 (S + |bias|).
    4. The output is rounded: u |y| + t.
    5. For few rows of halves, GPUs multiply x rounded to two digits to the base 256 (``kernels/digits.py``). The
       unit of 128 numbers is a power of two of at most 2**-14 (32768 / 32639) times their largest, and each is off by
       half of it. Those 128 are neighbours, unless columns are in another order: then the row's largest stands for
       theirs.

    Args:
        x: (M, K), or dy (M, N).
        weight: The packed weight.
        bias: (N,) or None.
        transposed: The product is ``dy @ W.T``.
        digits: Whether 5. counts; default: for up to 16 rows of halves.

    Returns:
        float64, the shape of the product. It bounds ``reference`` too, which rounds less.
    """
    dtype = x.dtype
    n = x.shape[1]
    u, u_wide, half = unit_roundoff(dtype), _accumulation(dtype), _is_half(dtype)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    e, c = coefficients(dtype, weight.scales.dtype, weight.spec.bits)

    W = reference.dequantize(weight, torch.float64)
    W = W.t() if transposed else W
    rows = x.double().abs()
    total = rows @ W.abs()
    stray = rows.sum(1, keepdim=True) * tiny
    error = e * total + stray
    top = (1 + e) * total + stray
    error = error + (n + 1) * c * (1 + n * c) * top
    if digits if digits is not None else half and not transposed and len(x) <= ROWS_OF_DIGITS:
        error = error + (2.0**-15 * 32768 / 32639) * (_largest_beside(rows, weight) @ W.abs())
    if bias is not None:
        error = error + u_wide * (top + bias.double().abs())
    y = oracle(x, weight, bias, transposed=transposed).abs()
    return error + u * (y + error) + tiny


def _largest_beside(rows: Tensor, weight: PackedWeight) -> Tensor:
    """For each element of (M, K) the largest of those that share a unit with it, or of its row."""
    size = weight.spec.rows_per_group(weight.K)
    in_order = weight.g_idx is None and (size >= weight.K or size in (32, 64) or size % 128 == 0)
    width = 128 if in_order else weight.K
    blocks = torch.nn.functional.pad(rows, (0, -weight.K % width)).unflatten(1, (-1, width))
    return blocks.amax(2, keepdim=True).expand_as(blocks).flatten(1)[:, : weight.K]
