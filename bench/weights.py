"""Random quantized weights, their dense form, and exact products with them."""

from __future__ import annotations

import torch
from cases import Case
from torch import Tensor

from gptq_triton.packing import PackedWeight, pack_weight, trivial_g_idx, unpack, unpack_zeros, words
from gptq_triton.reference import dequantize
from gptq_triton.solver import SolverOptions, round_to_nearest
from gptq_triton.spec import QuantSpec

SLAB = 4096  # columns dequantized to float64 at once; a multiple of 32, so that zero points split at words


def random_weight(case: Case, device: torch.device | str, seed: int = 0) -> PackedWeight:
    """Normal numbers rounded to nearest, never constant: equal operands draw less power and run at higher clocks.

    Outputs are of about unit size for activations of unit size.
    """
    random = torch.Generator(device).manual_seed(seed)
    N, K, dtype = case.N, case.K, getattr(torch, case.dtype)
    spec = QuantSpec(case.bits, case.group_size, sym=case.sym, desc_act=case.act_order)
    g_idx = trivial_g_idx(K, case.group_size, device)
    if case.act_order:
        g_idx = g_idx[torch.randperm(K, generator=random, device=device)]
    by_group = g_idx.argsort(stable=True)
    columns = torch.randn(K, N, generator=random, device=device).div_(K**0.5)
    found = round_to_nearest(columns, torch.ones(K, device=device), spec, SolverOptions(scale_dtype=dtype))
    order, codes = g_idx if case.act_order else None, found.codes[by_group.argsort()]
    return pack_weight(codes, found.scales, found.zeros, order, spec, "gptq_v2")


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
