"""Folding a LoRA adapter into quantized layers, whose scales and zero points stay as they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import reference
from .adapter import LowRank, read_adapter
from .filling import places
from .hessian import Hessian
from .layers import weight_of
from .linear import QuantLinear
from .packing import PackedWeight, pack, trivial_g_idx, unpack, unpack_zeros
from .ranks import Ranks
from .solver import SolverOptions, requantize
from .streaming import Batch, Observer, as_batches, capture, decoder_blocks, default_device, runner


@dataclass(frozen=True)
class MergeReport:
    """How the merge of one layer came out, with W the old weight, D the adapter's change and W' the new weight.

    Attributes:
        name: Full module name.
        rank: Of the adapter.
        method: "gptq", "rtn" (rounded to nearest) or "exact" (a layer in full precision).
        error: ``||W' - (W + D)|| / ||W + D||``: what the grid cost.
        delta_error: The same over ``||D||``: 1 and more means that the change drowned in rounding.
        kept: Share of D that arrived: the projection of W' - W on D. A change far below half a step rounds away.
        changed: Share of the codes that changed.
        clipped: Share of weights that W + D took beyond the range of their group.
        output_error: Relative output error on the calibration inputs, ``tr(E H E^T) / tr(W H W^T)``; None without.
    """

    name: str
    rank: int
    method: Literal["gptq", "rtn", "exact"]
    error: float
    delta_error: float
    kept: float
    changed: float
    clipped: float
    output_error: float | None = None


@torch.no_grad()
def merge_lora(
    model: nn.Module,
    adapter: str | Path,
    calibration: Iterable[Any] | None = None,
    *,
    device: torch.device | str | None = None,
) -> list[MergeReport]:
    """Fold a LoRA adapter into a quantized model, in place: only codes change, no tensor is added.

    Each weight becomes ``dequantized + B @ A * scaling``, rounded to the layer's own scales and zero points.
    With calibration data the solver rounds it, block by block, and moves rounding errors to where they cost
    least; without, it is rounded to nearest. Layers in full precision take the change as it is.

    Args:
        model: Loaded by :func:`gptq_triton.load_quantized` or quantized by :func:`gptq_triton.quantize_model`.
        adapter: Folder as PEFT's ``save_pretrained`` writes it.
        calibration: As for :func:`gptq_triton.quantize_model`; default: none.
        device: Where blocks are solved; default: the GPU if there is one, else where the model is.

    Returns:
        One report per layer.

    Raises:
        ValueError: The adapter cannot be read, or does not fit the model; the model is then as it was.
    """
    found, copies = read_adapter(adapter)
    modules, state = dict(model.named_modules()), model.state_dict()
    for name, tensor in copies.items():
        own = state.get(name)
        if isinstance(modules.get(name.removesuffix(".weight")), QuantLinear):
            continue  # the head as it was before it was quantized
        if own is None or own.shape != tensor.shape or not torch.equal(own, tensor.to(own)):
            raise ValueError(f"the adapter brings its own {name}, which is not the model's; only LoRA can be merged")
    for name, low_rank in found.items():
        _check(name, modules.get(name), low_rank)
    solved: dict[str, MergeReport] = {}
    if calibration is not None:
        solved = _by_block(model, found, as_batches(calibration), torch.device(device or default_device(model)))
    for name, low_rank in found.items():
        if name not in solved:  # outside the blocks, or no calibration
            solved[name] = _merge(model, name, low_rank, None)
    return [solved[name] for name in found]


def _check(name: str, module: nn.Module | None, low_rank: LowRank) -> None:
    if module is None:
        raise ValueError(f"the adapter changes {name}, which the model does not have")
    N, K = (module.outfeatures, module.infeatures) if isinstance(module, QuantLinear) else weight_of(module).shape
    if (low_rank.B.shape[0], low_rank.A.shape[1]) != (N, K):
        raise ValueError(
            f"the adapter's {name} has {low_rank.A.shape[1]} inputs and {low_rank.B.shape[0]} outputs, "
            f"the model's {K} and {N}"
        )


def _by_block(
    model: nn.Module, found: dict[str, LowRank], batches: list[Batch], device: torch.device
) -> dict[str, MergeReport]:
    """Merge the layers of all decoder blocks in order, each on what the merged blocks before it give."""
    blocks = decoder_blocks(model)
    hidden, calls = capture(model, list(blocks.values()), batches, device)
    masks = [batch["attention_mask"].bool().to(device) if "attention_mask" in batch else None for batch in batches]
    reports = {}
    for index, (block_name, block) in enumerate(blocks.items()):
        home = next(iter(block.state_dict().values())).device
        block.to(device)
        run = runner(block, hidden, calls[index], device)
        names = [name for name in found if name.startswith(block_name + ".")]
        quantized = {name: model.get_submodule(name) for name in names}
        ideal = {name: _ideal(layer, found[name], hidden[0].dtype) for name, layer in quantized.items()}
        for name, layer in ideal.items():  # what they are given, and give, when nothing is rounded
            model.set_submodule(name, layer)
        observer = Observer(ideal)
        if names:
            observer.watch(run, masks, Ranks(len(masks)))
        for name, layer in quantized.items():
            model.set_submodule(name, layer)
            reports[name] = _merge(model, name, found[name], observer.hessian(name))
        if index + 1 < len(blocks):
            hidden = [run(batch) for batch in range(len(batches))]
        block.to(home)
    return reports


def _ideal(layer: nn.Module, low_rank: LowRank, dtype: torch.dtype) -> nn.Linear:
    """The merged layer in floating point."""
    weight = layer.dequantize(torch.float32) if isinstance(layer, QuantLinear) else weight_of(layer).float()
    merged = weight + low_rank.delta(weight.device)
    bias = getattr(layer, "bias", None)
    fresh = nn.Linear(merged.shape[1], merged.shape[0], bias is not None, device="meta")
    fresh.weight = nn.Parameter(merged.to(dtype))
    if bias is not None:
        fresh.bias = nn.Parameter(bias.to(dtype))
    return fresh


def _merge(model: nn.Module, name: str, low_rank: LowRank, hessian: Hessian | None) -> MergeReport:
    module = model.get_submodule(name)
    if not isinstance(module, QuantLinear):
        weight = weight_of(module)
        weight += low_rank.delta(weight.device).to(weight.dtype)
        return MergeReport(name, low_rank.rank, "exact", 0.0, 0.0, 1.0, 1.0, 0.0)
    weight = _packed(module)
    spec, K = weight.spec, weight.K
    zeros = unpack_zeros(weight.qzeros, spec.bits, weight.N, weight.checkpoint_format)
    g_idx = trivial_g_idx(K, spec.group_size, zeros.device) if weight.g_idx is None else weight.g_idx
    old, delta = reference.dequantize(weight, torch.float32).t(), low_rank.delta(zeros.device)
    wanted = old + delta
    codes, method = requantize(wanted, hessian, weight.scales, zeros, g_idx, spec, SolverOptions())
    merged = replace(weight, qweight=pack(codes, spec.bits))
    fresh = QuantLinear.from_packed(merged, module.bias)
    for place in places(model)[id(module)]:
        model.set_submodule(place, fresh)
    error = reference.dequantize(merged, torch.float32).t() - wanted
    scales = weight.scales.float()[g_idx.long()].t()  # (N, K)
    top = (spec.maxq - zeros.float())[g_idx.long()].t() * scales
    bottom = -zeros.float()[g_idx.long()].t() * scales
    outside = (wanted > top + scales / 2) | (wanted < bottom - scales / 2)
    size = float(delta.square().sum())
    return MergeReport(
        name,
        low_rank.rank,
        method,
        error=_ratio(error, wanted),
        delta_error=_ratio(error, delta),
        kept=float(((error + delta) * delta).sum()) / size if size else 1.0,
        changed=float((codes != unpack(weight.qweight, spec.bits, K)).float().mean()),
        clipped=float(outside.float().mean()),
        output_error=None if hessian is None else _output_error(error, wanted, hessian.sum),
    )


def _packed(layer: QuantLinear) -> PackedWeight:
    """The layer's weight in checkpoint form, however it is resident."""
    state = layer.state_dict()
    g_idx = state["g_idx"] if layer.act_order else None
    tensors = state["qweight"], state["scales"], state["qzeros"], g_idx
    return PackedWeight(*tensors, layer.spec, layer.infeatures, layer.checkpoint_format)


def _ratio(error: Tensor, size: Tensor) -> float:
    whole = float(size.norm())
    return float(error.norm()) / whole if whole else 0.0


def _output_error(error: Tensor, weight: Tensor, H: Tensor) -> float:
    size = float(((weight @ H) * weight).sum(dtype=torch.float64))
    return float(((error @ H) * error).sum(dtype=torch.float64)) / size if size else 0.0
