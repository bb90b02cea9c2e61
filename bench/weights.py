"""Random quantized weights, their dense form, and exact products with them."""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

from gptq_triton.packing import PackedWeight, pack_zeros, trivial_g_idx, unpack, unpack_zeros, words
from gptq_triton.reference import dequantize
from gptq_triton.spec import QuantSpec

SLAB = 4096  # columns dequantized to float64 at once; a multiple of 32, so that zero points split at words


def random_weight(case: Case, device: torch.device | str, seed: int = 0) -> PackedWeight:
    """Random codes, never constant: equal operands draw less power and run at higher clocks.

    Scales make outputs of about unit size from activations of unit size.
    """
    random = torch.Generator(device).manual_seed(seed)
    K, N, bits = case.K, case.N, case.bits
    spec = QuantSpec(bits, case.group_size, sym=case.sym, desc_act=case.act_order)
    shape = (spec.groups(K), N)
    middle = 2 ** (bits - 1)
    zeros = torch.full(shape, middle, device=device)
    if not case.sym:
        zeros += torch.randint(-(middle // 2), middle // 2 + 1, shape, generator=random, device=device)
    scales = (0.5 + torch.rand(shape, generator=random, device=device)) * 3 / (spec.maxq * K**0.5)
    g_idx = None
    if case.act_order:
        g_idx = trivial_g_idx(K, case.group_size, device)[torch.randperm(K, generator=random, device=device)]
    low, high = -(2**31), 2**31
    return PackedWeight(
        torch.randint(low, high, (words(K, bits), N), generator=random, device=device, dtype=torch.int32),
        scales.to(getattr(torch, case.dtype)),
        pack_zeros(zeros, bits, "gptq_v2"),
        g_idx,
        spec,
        K,
        "gptq_v2",
    ).validate()


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """(N, K), as ``nn.Linear`` holds it: each element rounded once to dtype."""
    return dequantize(weight, dtype).t().contiguous()


def codes_of(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (K, N), scales and zero points (G, N), for peers that take them as they are."""
    spec = weight.spec
    zeros = unpack_zeros(weight.qzeros, spec.bits, weight.N, weight.checkpoint_format)
    return unpack(weight.qweight, spec.bits, weight.K), weight.scales, zeros


def exact(x: Tensor, weight: PackedWeight, op: str) -> Tensor:
    """The product in float64, slab by slab."""
    x = x.double()
    slabs = [slice(start, min(start + SLAB, weight.N)) for start in range(0, weight.N, SLAB)]
    if op == "matmul":
        return torch.cat([x @ dequantize(_columns(weight, slab), torch.float64) for slab in slabs], 1)
    out = x.new_zeros(x.shape[0], weight.K)
    for slab in slabs:
        out += x[:, slab] @ dequantize(_columns(weight, slab), torch.float64).t()
    return out


def _columns(weight: PackedWeight, slab: slice) -> PackedWeight:
    bits = weight.spec.bits
    return PackedWeight(
        weight.qweight[:, slab],
        weight.scales[:, slab],
        weight.qzeros[:, slab.start * bits // 32 : words(slab.stop, bits)],
        weight.g_idx,
        weight.spec,
        weight.K,
        weight.checkpoint_format,
    )


def checked_rows(M: int, at_most: int = 256) -> Tensor:
    """Rows of a product that are compared: all, or evenly spaced ones with the first and the last."""
    return torch.linspace(0, M - 1, min(M, at_most)).round().long()


def error(y: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm; NaN and infinity show."""
    return float((y.double() - expected).norm() / expected.norm())
