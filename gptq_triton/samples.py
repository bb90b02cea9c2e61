"""Random weights and activations, the same for the same seed: what the selftest and the tests run on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .packing import PackedWeight, pack_weight, trivial_g_idx
from .spec import QuantSpec


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
        exact: Scales are 1, 1/2 or 1/4, so that products with small integers have no rounding.
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
    return map_tensors(weight, lambda tensor: tensor.to(device))


def random_rows(M: int, width: int, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(M, width) normal numbers."""
    return torch.randn(M, width, generator=generator(seed)).to(device, dtype)


def map_tensors(weight: PackedWeight, change: Callable[[Tensor], Tensor]) -> PackedWeight:
    """The same weight with every tensor changed."""
    names = ("qweight", "scales", "qzeros", "g_idx")
    tensors = {name: getattr(weight, name) for name in names}
    return replace(weight, **{name: None if tensor is None else change(tensor) for name, tensor in tensors.items()})
