"""Shared by tests: random packed weights, hypothesis strategies, and how far a product may be off."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from gptq_triton import reference
from gptq_triton.packing import PackedWeight, pack_weight, trivial_g_idx
from gptq_triton.spec import BITS, QuantSpec

FORMATS = ("gptq", "gptq_v2")
GROUP_SIZES = (-1, 1, 7, 16, 24, 32, 64, 100, 128)


def generator(seed: int) -> torch.Generator:
    """The same numbers for the same seed, on every device."""
    return torch.Generator().manual_seed(seed)


def random_weight(
    K: int,
    N: int,
    bits: int,
    group_size: int = -1,
    *,
    act_order: bool = False,
    sym: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    checkpoint_format: str = "gptq",
    exact: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PackedWeight:
    """A weight with every code and zero point equally likely.

    Args:
        K: In-features.
        N: Out-features.
        bits: 2, 3, 4 or 8.
        group_size: As in QuantSpec.
        act_order: Rows in random groups, with a g_idx.
        sym: Every zero point is the middle one.
        scale_dtype: Of the scales.
        checkpoint_format: "gptq" or "gptq_v2".
        exact: Scales are 1, 1/2 or 1/4, so that products with :func:`exact_rows` have no rounding.
        seed: Of the random numbers.
        device: Where the tensors go.
    """
    rng = generator(seed)
    spec = QuantSpec(bits, group_size, sym=sym, desc_act=act_order)
    G = spec.groups(K)
    codes = torch.randint(0, spec.maxq + 1, (K, N), generator=rng)
    if sym:
        zeros = torch.full((G, N), 2 ** (bits - 1))
    else:
        zeros = torch.randint(0, spec.maxq + 1, (G, N), generator=rng)
    if exact:
        scales = 0.5 ** torch.randint(0, 3, (G, N), generator=rng).float()
    else:
        scales = (0.5 + torch.rand(G, N, generator=rng)) / (spec.maxq * math.sqrt(K))
    g_idx = trivial_g_idx(K, group_size)[torch.randperm(K, generator=rng)] if act_order else None
    weight = pack_weight(codes, scales.to(scale_dtype), zeros, g_idx, spec, checkpoint_format)
    return _map(weight, lambda tensor: tensor.to(device))


def exact_rows(M: int, width: int, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(M, width) small integers: a product with an ``exact`` weight has one right answer.

    Each product is a multiple of 1/4 up to 2 * 255, so sums of fewer than 2**13 of them are exact in
    float32 in any order. Only the output is rounded, once, and that is defined to the bit.
    """
    return torch.randint(-2, 3, (M, width), generator=generator(seed)).to(device, dtype)


def random_rows(M: int, width: int, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(M, width) normal numbers."""
    return torch.randn(M, width, generator=generator(seed)).to(device, dtype)


def poisoned(tensor: Tensor) -> Tensor:
    """The same matrix inside a larger one full of NaN (integers: -1), so that no read goes astray unseen."""
    fill = float("nan") if tensor.is_floating_point() else -1
    around = torch.full((tensor.shape[0] + 3, tensor.shape[1] + 5), fill, dtype=tensor.dtype, device=tensor.device)
    inside = around[1:-2, 2:-3]
    return inside.copy_(tensor)


def poisoned_weight(weight: PackedWeight) -> PackedWeight:
    """A weight whose matrices are each inside a larger one of garbage."""
    return _map(weight, lambda tensor: poisoned(tensor) if tensor.dim() == 2 else tensor)


def _map(weight: PackedWeight, change) -> PackedWeight:
    names = ("qweight", "scales", "qzeros", "g_idx")
    tensors = {name: getattr(weight, name) for name in names}
    return replace(weight, **{name: None if tensor is None else change(tensor) for name, tensor in tensors.items()})


def weights(
    max_k: int = 200,
    max_n: int = 100,
    *,
    exact: bool = False,
    scale_dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32),
    device: torch.device | str = "cpu",
) -> st.SearchStrategy[PackedWeight]:
    """Packed weights of any shape, width, grouping and format."""
    return st.builds(
        random_weight,
        K=st.integers(1, max_k),
        N=st.integers(1, max_n),
        bits=st.sampled_from(BITS),
        group_size=st.sampled_from(GROUP_SIZES),
        act_order=st.booleans(),
        sym=st.booleans(),
        scale_dtype=st.sampled_from(scale_dtypes),
        checkpoint_format=st.sampled_from(FORMATS),
        exact=st.just(exact),
        seed=st.integers(0, 2**16),
        device=st.just(device),
    )


def oracle(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """The product in float64."""
    if transposed:
        return reference.matmul_transposed(x.double(), weight)
    return reference.matmul(x.double(), weight, None if bias is None else bias.double())


_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # of the significand, in bits


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to nearest."""
    return 2.0 ** -_DIGITS[dtype]


def error_bound(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """How far each element of a product may be from the oracle.

    With u the unit roundoff of the dtype of x, t half its smallest number, u32 and so on alike, the
    sum over k of n terms, d = code - zero (exact), w = scale * d:

    1. ``fl32(scale * d)`` is exact if the digits of scale and the bits of d fit float32's 24, else
       off by u32 |w|. Rounding it to the dtype of x adds u |w| + t (nothing for float32). In all
       ``|w' - w| <= e |w| + t``.
    2. Products x w' are exact in a tensor core and fused in an FMA. float32 rounds each of the n
       additions by u32 of at most S = sum |x| |w'|. Tensor cores add blocks of 8 or 16 terms to the
       sum, each cut (not rounded) at 2 u32 of the largest, and cut the result: at most
       (8 + 2) / 8 * 2 u32 a term. So the sum is off by ``n c S`` with c = u32 or 2.5 u32, one more
       where products are rounded too, to first order; (1 + n c) covers the rest.
    3. Adding the bias in float32 rounds once more: u32 (S + |bias|).
    4. The output is rounded: u |y| + t.

    Returns:
        float64, the shape of the product. It bounds ``reference`` too, which rounds less.
    """
    dtype = x.dtype
    n = x.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u, u_wide = unit_roundoff(dtype), unit_roundoff(wide)
    half = dtype not in (torch.float32, torch.float64)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    exact_scale = _DIGITS[weight.scales.dtype] + weight.spec.bits <= _DIGITS[wide]
    e = (0.0 if exact_scale else u_wide) + (u * (1 + u_wide) if half else 0.0)
    c = 2.5 * u_wide if half else u_wide

    W = reference.dequantize(weight, torch.float64)
    W = W.t() if transposed else W
    rows = x.double().abs()
    total = rows @ W.abs()
    stray = rows.sum(1, keepdim=True) * tiny
    error = e * total + stray
    top = (1 + e) * total + stray
    error = error + (n + 1) * c * (1 + n * c) * top
    if bias is not None:
        error = error + u_wide * (top + bias.double().abs())
    y = oracle(x, weight, bias, transposed=transposed).abs()
    return error + u * (y + error) + tiny


def assert_close(
    y: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, transposed: bool = False
) -> None:
    """Fail unless y has the dtype of x and every element is within :func:`error_bound` of the oracle."""
    expected = oracle(x, weight, bias, transposed=transposed)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    excess = (y.double() - expected).abs() - error_bound(x, weight, bias, transposed=transposed)
    assert bool((excess <= 0).all()), f"worst excess {excess.max().item()}, NaN: {bool(y.isnan().any())}"


def relative_error(y: Tensor, expected: Tensor) -> float:
    """``||y - expected|| / ||expected||``."""
    return float((y.double() - expected).norm() / expected.norm())


def typical_error(n: int, dtype: torch.dtype) -> float:
    """What :func:`relative_error` of many sums of n random terms must stay under.

    Roundings of random data have random signs, so their root mean square counts, which is under the
    worst case each of them has: u for the weights, u for the output, sqrt(n) u32 for the additions.
    """
    u = unit_roundoff(dtype)
    return math.sqrt(2 * u**2 + n * unit_roundoff(torch.float32) ** 2)
