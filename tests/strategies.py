"""Shared by tests: random packed weights, hypothesis strategies, and how far a product may be off."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from gptq_triton.bounds import error_bound, oracle, unit_roundoff
from gptq_triton.packing import PackedWeight
from gptq_triton.samples import generator, map_tensors, random_weight
from gptq_triton.samples import random_rows as random_rows  # for the tests
from gptq_triton.spec import BITS

FORMATS = ("gptq", "gptq_v2")
GROUP_SIZES = (-1, 1, 7, 16, 24, 32, 64, 100, 128)


def exact_rows(M: int, width: int, dtype: torch.dtype, *, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(M, width) small integers: a product with an ``exact`` weight has one right answer.

    Each product is a multiple of 1/4 up to 2 * 255, so sums of fewer than 2**13 of them are exact in
    float32 in any order. Only the output is rounded, once, and that is defined to the bit.
    """
    return torch.randint(-2, 3, (M, width), generator=generator(seed)).to(device, dtype)


def poisoned(tensor: Tensor) -> Tensor:
    """The same matrix inside a larger one full of NaN (integers: -1), so that no read goes astray unseen."""
    fill = float("nan") if tensor.is_floating_point() else -1
    around = torch.full((tensor.shape[0] + 3, tensor.shape[1] + 5), fill, dtype=tensor.dtype, device=tensor.device)
    inside = around[1:-2, 2:-3]
    return inside.copy_(tensor)


def poisoned_weight(weight: PackedWeight) -> PackedWeight:
    """A weight whose matrices are each inside a larger one of garbage."""
    return map_tensors(weight, lambda tensor: poisoned(tensor) if tensor.dim() == 2 else tensor)


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
