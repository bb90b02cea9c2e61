"""Layers that read the same input as one product: q, k and v, or gate and up, in one launch instead of three or two.

The model's code does not change: each layer is replaced by its part of the merged one. The first part to be called with
an input multiplies for all; the others take what is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantLinear
from .packing import PackedWeight, pack_weight, unpack, unpack_zeros

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)


class _Merged:
    """The merged layer and, between the first and the last part's call, its output."""

    def __init__(self, linear: QuantLinear, sizes: Sequence[int]) -> None:
        self.linear = linear
        self.sizes = list(sizes)
        self.split = False  # over several ranks
        self.x: Tensor | None = None
        self.parts: list[Tensor | None] = []

    def part(self, x: Tensor, index: int) -> Tensor:
        if self.x is not x or self.parts[index] is None:
            self.x, self.parts = x, list(self.linear(x).split(self.sizes, -1))
        y = self.parts[index]
        self.parts[index] = None
        if all(part is None for part in self.parts):
            self.x = None  # nothing outlives the block
        if y is None:
            raise RuntimeError("a part of a merged layer is missing")
        return y


class FusedPart(nn.Module):
    """One layer's share of a merged layer; its state dict is that of the layer it stands for.

    Attributes:
        in_features: K.
        out_features: N of this part.
    """

    def __init__(self, merged: _Merged, index: int) -> None:
        super().__init__()
        self._merged = merged
        self._index = index
        self.in_features = merged.linear.in_features
        self.out_features = merged.sizes[index]
        if index == 0:
            self.merged = merged.linear  # moved and counted once

    def forward(self, x: Tensor) -> Tensor:
        """The layer's linear map: as `QuantLinear.forward`."""
        return self._merged.part(x, self._index)

    def unfused(self) -> QuantLinear:
        """A layer of its own with the same weight and bias."""
        first = sum(self._merged.sizes[: self._index])
        linear, part = self._merged.linear, slice(first, first + self.out_features)
        weight, bias = linear.weight_packed, linear.bias
        codes, scales, zeros = _unpacked(weight)
        g_idx = linear.g_idx.clone() if linear.act_order else None  # of its own, or it could not be saved
        own = pack_weight(
            codes[:, part], scales[:, part], zeros[:, part], g_idx, weight.spec, weight.checkpoint_format
        )  # fmt: skip
        return QuantLinear.from_packed(own, None if bias is None else bias[part].clone())

    def outline(self) -> QuantLinear:
        """As `unfused`, without storage."""
        linear = self._merged.linear
        own = QuantLinear(
            linear.bits,
            linear.spec.group_size,
            self.in_features,
            self.out_features,
            device="meta",
            checkpoint_format=linear.checkpoint_format,
        )
        own.act_order = linear.act_order
        return own

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """That of the layer it stands for, without the merged one."""
        return self.unfused().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error_msgs.append(f"{prefix.rstrip('.')}: load before the layers are merged by fuse(), or unfuse() first")


def fuse(model: nn.Module, siblings: Iterable[Sequence[str]] = SIBLINGS) -> nn.Module:
    """Merge quantized layers that read the same input, in place.

    Only layers that agree in everything but their width are merged: bits, groups, order, format, dtypes and device.
    Layers whose call is more than their product stay as they are: those with hooks, and those that several ranks share,
    unless `ColwiseQuantLinear` has cut their outputs; such layers stay merged for good.

    Args:
        model: With `QuantLinear` layers.
        siblings: Names of layers of one parent that are called with the same tensor.

    Returns:
        The model.
    """
    for parent in list(model.modules()):
        for names in siblings:
            layers = [parent._modules.get(name) for name in names]
            linears = [layer for layer in layers if isinstance(layer, QuantLinear)]
            if len(linears) == len(names) and (kind := _kind(linears)) and _agree(linears):
                merged = _Merged(_merge(linears), [layer.outfeatures for layer in linears])
                if isinstance(kind, Split):
                    merged.split = True
                    merged.linear.register_forward_pre_hook(kind.before)
                for index, name in enumerate(names):
                    setattr(parent, name, FusedPart(merged, index))
    return model


def stored_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized layers that the model's state dict holds, by name; those that are merged as outlines."""
    parts = {name: module for name, module in model.named_modules() if isinstance(module, FusedPart)}
    merged = {id(part._merged.linear) for part in parts.values()}
    return {
        name: parts[name].outline() if name in parts else module
        for name, module in model.named_modules()
        if name in parts or (isinstance(module, QuantLinear) and id(module) not in merged)
    }  # pyright: ignore[reportReturnType]


def unfuse(model: nn.Module) -> nn.Module:
    """Give every merged layer its own weight again, in place; returns the model.

    Raises:
        ValueError: Several ranks share a merged layer.
    """
    for parent in list(model.modules()):
        parts = {name: child for name, child in parent.named_children() if isinstance(child, FusedPart)}
        if any(part._merged.split for part in parts.values()):
            raise ValueError(f"layers that several ranks share stay merged: {', '.join(parts)}")
        for name, layer in {name: part.unfused() for name, part in parts.items()}.items():
            setattr(parent, name, layer)
    return model


@dataclass(frozen=True)
class Split:
    """How a layer came to hold some of its outputs: what siblings must agree in, kept as `QuantLinear.split`.

    Attributes:
        key: Over which ranks, from which input.
        before: The hook that makes a layer's input what each rank needs. Outputs stay as they are.
    """

    key: Any
    before: Callable[..., Any] = field(compare=False)


def _kind(layers: list[QuantLinear]) -> Split | bool:
    """Whether calling the layers is their products and nothing else; or how all of them are split."""
    if all(layer.outfeatures == layer.out_features and not _hooks(layer) for layer in layers):
        return True
    splits = {layer.split for layer in layers}
    split = splits.pop() if len(splits) == 1 else None
    return split if isinstance(split, Split) and all(_hooks(layer) == 2 for layer in layers) else False


def _hooks(layer: QuantLinear) -> int:
    hooks = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks
    return sum(map(len, hooks)) + 3 * ("forward" in vars(layer))


def _agree(layers: list[QuantLinear]) -> bool:
    first = layers[0]
    same = {
        (layer.spec, layer.in_features, layer.checkpoint_format, layer.batch_invariant, layer.scale_dtype)
        for layer in layers
    }
    devices = {layer.g_idx.device for layer in layers}
    biases = {None if layer.bias is None else layer.bias.dtype for layer in layers}
    alike = len(same) == len(devices) == len(biases) == 1
    return alike and all(torch.equal(layer.g_idx, first.g_idx) for layer in layers)


def _merge(layers: list[QuantLinear]) -> QuantLinear:
    weights = [layer.weight_packed for layer in layers]
    codes, scales, zeros = (torch.cat(parts, 1) for parts in zip(*map(_unpacked, weights), strict=True))
    first = weights[0]
    merged = pack_weight(codes, scales, zeros, first.g_idx, first.spec, first.checkpoint_format)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    layer = QuantLinear.from_packed(merged, torch.cat(biases) if biases else None)
    layer.batch_invariant = layers[0].batch_invariant
    return layer.train(layers[0].training)


def _unpacked(weight: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    bits = weight.spec.bits
    codes = unpack(weight.qweight, bits, weight.K)
    return codes, weight.scales, unpack_zeros(weight.qzeros, bits, weight.N, weight.checkpoint_format)
