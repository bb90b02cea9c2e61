"""QuantLinear, which drops in for nn.Linear, and the functions that put it into a model.

Source: names and signatures are those of GPTQ-for-LLaMa and ColossalAI.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ops, product, reference
from .layers import weight_of
from .layout import TiledWeight, tile_weight, untile_weight
from .packing import (
    PackedWeight,
    check_g_idx,
    pack_weight,
    storable,
    symmetric_format,
    trivial_g_idx,
    words,
    zero_offset,
)
from .quantizer import encode
from .scratch import scratch_of
from .spec import QuantSpec

_PACKED = ("qweight", "qzeros", "scales")
_TILED = ("tile_words", "tile_meta", "tile_scales", "tile_order")


class QuantLinear(nn.Module):
    """A linear layer whose weight is 2-, 3-, 4- or 8-bit codes with a scale and zero point per group.

    ``y = x @ W + bias`` with ``W[k, n] = scales[g_idx[k], n] * (codes[k, n] - zeros[g_idx[k], n])``.
    The weight is frozen; gradients flow to x.

    Its state dict is that of a GPTQ checkpoint: ``qweight`` int32 (ceil(K * bits / 32), N), ``qzeros`` int32
    (G, ceil(N * bits / 32)), ``scales`` (G, N), ``g_idx`` int32 (K,), and ``bias`` (N,) or None. One that is loaded may
    lack ``g_idx`` (rows then belong to groups in order) and may bring a ``bias`` to a layer that has none; its dtypes
    are adopted.

    On the CPU these are the layer's buffers. On a GPU the first three are held as kernel tiles instead (`prepare`), and
    are empty or None: moving a layer there, packing it or loading it there does so. ``weight_packed`` has them on any
    device.

    Args:
        bits: 2, 3, 4 or 8.
        groupsize: Input rows per group, at least 1; -1 for all of them.
        infeatures: K, at least 1.
        outfeatures: N, at least 1.
        bias: Start with a zero bias. Packing or loading a layer that has one adds it anyway.
        dtype: Of scales and bias; default: torch's default dtype.
        device: Of all buffers.
        checkpoint_format: How zero points are stored: "gptq" (v1) or "gptq_v2". For symmetric
            weights the tensors of a loaded state dict decide.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A size is not an int, or dtype is not floating.
    """

    split: Any = None  # a `fusing.Split` where several ranks share the layer and siblings may still be merged
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None
    tile_words: Tensor
    tile_meta: Tensor
    tile_scales: Tensor | None
    tile_order: Tensor | None

    def __init__(
        self,
        bits: int,
        groupsize: int,
        infeatures: int,
        outfeatures: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        checkpoint_format: str = "gptq",
    ):
        super().__init__()
        for field, value in (("infeatures", infeatures), ("outfeatures", outfeatures)):
            if not isinstance(value, int):
                raise TypeError(f"{field} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{field} must be at least 1, got {value}")
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating, got {dtype}")
        zero_offset(checkpoint_format)
        self.spec = QuantSpec(bits, groupsize)
        self.bits = bits
        self.groupsize = self.spec.rows_per_group(infeatures)
        self.infeatures = self.in_features = infeatures
        self.outfeatures = self.out_features = outfeatures
        self.checkpoint_format = checkpoint_format
        self.act_order = False  # whether g_idx says more than "groups in order"
        self.batch_invariant = False  # whether, on a GPU, a row's bits must not depend on the rows beside it
        self._tiles: TiledWeight | None = None
        groups = self.spec.groups(infeatures)
        self.register_buffer(
            "qweight", torch.zeros(words(infeatures, bits), outfeatures, dtype=torch.int32, device=device)
        )
        self.register_buffer("qzeros", torch.zeros(groups, words(outfeatures, bits), dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.zeros(groups, outfeatures, dtype=dtype, device=device))
        self.register_buffer("g_idx", trivial_g_idx(infeatures, groupsize, device))
        self.register_buffer("bias", torch.zeros(outfeatures, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_packed(cls, weight: PackedWeight, bias: Tensor | None = None) -> QuantLinear:
        """A layer around an existing packed weight; tensors are taken, not copied."""
        layer = cls(
            weight.spec.bits,
            weight.spec.group_size,
            weight.K,
            weight.N,
            dtype=weight.scales.dtype,
            device="meta",
            checkpoint_format=weight.checkpoint_format,
        )
        layer._adopt(weight.validate(), bias)
        return layer

    @property
    def weight_packed(self) -> PackedWeight:
        """The weight in checkpoint form; made anew where the layer holds tiles."""
        if self._tiles is not None:
            return untile_weight(self._tiles, self.g_idx if self.act_order else None)
        return PackedWeight(
            self.qweight,
            self.scales,
            self.qzeros,
            self.g_idx if self.act_order else None,
            self.spec,
            self.infeatures,
            self.checkpoint_format,
        )

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales, however they are held."""
        return self.scales.dtype if self._tiles is None else self._tiles.dtype

    @property
    def tiles(self) -> TiledWeight | None:
        """The weight in kernel tiles, if the layer holds it so."""
        return self._tiles

    @torch.no_grad()
    def pack(self, linear: nn.Module, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> None:
        """Take over a layer's weight and bias, rounded to the given grid.

        Args:
            linear: nn.Linear (N, K) or transformers' Conv1D (K, N).
            scales: (N, G), > 0. Stored in the layer's dtype; codes are computed with what is stored.
            zeros: (N, G), integral, in [0, 2**bits - 1].
            g_idx: (K,), the group of each input row; default: groups in order.

        Raises:
            ValueError: A shape or value does not fit.
            TypeError: ``linear`` is not a layer that can be packed.
        """
        weight = weight_of(linear)
        groups = self.spec.groups(self.infeatures)
        if tuple(weight.shape) != (self.outfeatures, self.infeatures):
            raise ValueError(
                f"linear must have {self.infeatures} in-features and {self.outfeatures} out-features, "
                f"got a weight of shape {tuple(weight.shape)}"
            )
        for field, value in (("scales", scales), ("zeros", zeros)):
            if tuple(value.shape) != (self.outfeatures, groups):
                raise ValueError(f"{field} must have shape {(self.outfeatures, groups)}, got {tuple(value.shape)}")
        if not bool((scales > 0).all()):
            raise ValueError("scales must be greater than 0")
        rows = trivial_g_idx(self.infeatures, self.spec.group_size)
        if g_idx is not None:
            rows = g_idx.to(torch.int32)
            check_g_idx(rows, self.infeatures, groups)
        rows = rows.to(weight.device)
        stored = storable(scales.to(weight.device).t(), self.scale_dtype)
        zeros = zeros.to(weight.device).t()
        wide = torch.promote_types(torch.float32, torch.promote_types(weight.dtype, stored.dtype))
        codes = encode(weight.t().to(wide), stored.to(wide)[rows], zeros.to(wide)[rows], self.spec.maxq)
        packed = pack_weight(codes, stored, zeros, rows, self.spec, self.checkpoint_format)
        bias = getattr(linear, "bias", None)
        self._adopt(packed, None if bias is None else bias.to(self.scale_dtype, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """The linear map, fp32-accumulated.

        Args:
            x: (..., K), float16, bfloat16 or float32 (float64 too on the CPU), any strides.

        Returns:
            (..., N), the dtype of x (under autocast: the autocast dtype).

        Raises:
            ValueError: The last dimension is not K, or x is on another device.
            TypeError: x is not floating.
        """
        tiles = self._tiles
        if tiles is not None and ops.plain(x, tiles, self._buffers["bias"]):
            return product.product(x, self._buffers["bias"], tiles, self.batch_invariant)
        if x.shape[-1:] != (self.infeatures,):
            raise ValueError(f"x must have {self.infeatures} features, got shape {tuple(x.shape)}")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # a compiler must see buffers, which are constants to it
        weight = self.weight_packed if tiles is None else self._tiled_by_buffers()
        y = ops.matmul(x.reshape(-1, self.infeatures), weight, self.bias, batch_invariant=self.batch_invariant)
        return y.view(*x.shape[:-1], self.outfeatures)

    def prepare(self) -> None:
        """Hold the weight as kernel tiles, if the layer is on a GPU and does not yet.

        Scales of 64 bits have no tiles: such a layer stays as it is, and is multiplied by the reference.
        """
        if self._tiles is None and self.qweight.is_cuda and self.scales.dtype != torch.float64:
            scratch_of(self.qweight.get_device())  # while no CUDA graph is captured
            self._tile()

    def _tile(self) -> None:
        """Hold tiles, on any device."""
        self._tiles = tile_weight(self.weight_packed)
        for name in _PACKED:
            self._buffers[name] = None
        self.qweight = self.g_idx.new_empty(0)  # PEFT asks where a layer is by it
        for name in _TILED:
            self.register_buffer(name, getattr(self._tiles, name.removeprefix("tile_")), persistent=False)

    def _tiled_by_buffers(self) -> TiledWeight:
        """The tiled weight with the buffers as they are now."""
        tiles = cast(TiledWeight, self._tiles)
        return TiledWeight(
            self.tile_words,
            self.tile_meta,
            self.tile_scales,
            self.tile_order,
            tiles.group_columns,
            tiles.spec,
            tiles.K,
            tiles.N,
            tiles.dtype,
            tiles.checkpoint_format,
        )

    def _unprepare(self) -> None:
        """Hold the checkpoint's tensors."""
        if self._tiles is not None:
            weight = self.weight_packed
            self._drop_tiles()
            for name in _PACKED:
                self._buffers[name] = getattr(weight, name)

    def _drop_tiles(self) -> None:
        if self._tiles is not None:
            self._tiles = None
            for name in _TILED:
                del self._buffers[name]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        if self._tiles is not None and self._tiles.scales is None and fn(self.g_idx).is_cuda:
            super()._apply(fn, recurse)
            self._tiles = self._tiled_by_buffers()
            return self
        self._unprepare()  # also where scales may get another dtype
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tiles is not None:
            weight = self.weight_packed
            for name in _PACKED:
                destination[prefix + name] = getattr(weight, name)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as ``nn.Linear`` holds it, (N, K); default dtype: that of the scales."""
        return reference.dequantize(self.weight_packed, dtype).t()

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.infeatures}, out_features={self.outfeatures}, bits={self.bits}, "
            f"groupsize={self.groupsize}, act_order={self.act_order}, bias={self.bias is not None}"
        )

    def _adopt(self, weight: PackedWeight, bias: Tensor | None) -> None:
        """Take these (validated) tensors as the layer's own."""
        self._drop_tiles()
        device = weight.qweight.device
        trivial = trivial_g_idx(self.infeatures, self.spec.group_size, device)
        if weight.g_idx is None:
            self.act_order, self.g_idx = False, trivial
        else:
            self.g_idx = weight.g_idx
            self.act_order = not weight.g_idx.is_meta and not torch.equal(weight.g_idx, trivial)
        self.qweight, self.scales, self.qzeros, self.bias = weight.qweight, weight.scales, weight.qzeros, bias
        self.checkpoint_format = weight.checkpoint_format
        self.prepare()

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
        known = ("qweight", "qzeros", "scales", "g_idx", "bias")
        found = {name: state_dict[prefix + name] for name in known if prefix + name in state_dict}
        required = known[:3] if self.bias is None else (*known[:3], "bias")
        missing = [prefix + name for name in required if name not in found]
        if strict:
            missing_keys += missing
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in known]
        if missing:
            return
        if not local_metadata.get("assign_to_params_buffers"):
            found = {name: tensor.to(self.g_idx.device, copy=True) for name, tensor in found.items()}
        try:
            weight, bias = self._read(found)
        except ValueError as error:
            error_msgs.append(f"{prefix.rstrip('.') or 'QuantLinear'}: {error}")
            return
        self._adopt(weight, bias)

    def _read(self, found: dict[str, Tensor]) -> tuple[PackedWeight, Tensor | None]:
        """The weight and bias in a state dict, validated."""
        g_idx, bias = found.get("g_idx"), found.get("bias")
        if g_idx is not None and g_idx.dtype == torch.int64:
            g_idx = g_idx.clamp(-1, 2**31 - 1).to(torch.int32)
        if bias is not None and tuple(bias.shape) != (self.outfeatures,):
            raise ValueError(f"bias must have shape {(self.outfeatures,)}, got {tuple(bias.shape)}")
        weight = PackedWeight(
            found["qweight"],
            found["scales"],
            found["qzeros"],
            g_idx,
            self.spec,
            self.infeatures,
            self.checkpoint_format,
        )
        if weight.qweight.dim() == 2 and self.outfeatures != weight.N:
            raise ValueError(f"qweight must have {self.outfeatures} columns, got {weight.N}")
        weight.validate()
        if not weight.qzeros.is_meta:
            weight = dataclasses.replace(weight, checkpoint_format=symmetric_format(weight) or self.checkpoint_format)
        return weight, bias


def prepare(module: nn.Module) -> nn.Module:
    """Hold the weight of every quantized layer that is on a GPU as kernel tiles, in place.

    Moving, packing and loading do so by themselves; this is for layers whose tensors were put on a GPU one by one.
    Until then their products go through the reference.
    """
    for layer in module.modules():
        if isinstance(layer, QuantLinear):
            layer.prepare()
    return module


def make_quant(
    module: nn.Module, names: Collection[str], bits: int, groupsize: int, name: str = "", **options: Any
) -> None:
    """Replace layers of a module by empty QuantLinear layers, in place, ready for a state dict.

    Args:
        module: Where the layers are.
        names: Dotted names (a list, or the keys of :func:`find_layers`). A layer tied to several
            names is replaced under all of them. A QuantLinear is left as it is.
        bits: 2, 3, 4 or 8.
        groupsize: Input rows per group; -1 for all of them.
        name: Prefix that ``names`` carry and the module does not.
        options: Further arguments of :class:`QuantLinear`.

    Raises:
        ValueError: A name matches no layer, or the module itself.
        TypeError: A named layer is not an nn.Linear or transformers' Conv1D.
    """
    prefix = name + "." if name else ""
    paths = {prefix + path: child for path, child in module.named_modules(remove_duplicate=False) if path}
    unknown = sorted(set(names) - set(paths))
    if unknown:
        raise ValueError(f"names must be layers of the module; these are not: {', '.join(unknown)}")
    wanted = {id(paths[n]): paths[n] for n in names if not isinstance(paths[n], QuantLinear)}
    fresh = {key: _empty(layer, bits, groupsize, options) for key, layer in wanted.items()}
    for path, child in paths.items():
        if id(child) in fresh:
            module.set_submodule(path[len(prefix) :], fresh[id(child)])


def _empty(layer: nn.Module, bits: int, groupsize: int, options: dict[str, Any]) -> QuantLinear:
    if isinstance(layer, nn.Conv2d):
        raise TypeError("QuantLinear stands for nn.Linear and transformers' Conv1D, not for nn.Conv2d")
    weight = weight_of(layer)
    defaults = {"bias": getattr(layer, "bias", None) is not None, "dtype": weight.dtype, "device": weight.device}
    return QuantLinear(bits, groupsize, weight.shape[1], weight.shape[0], **(defaults | options))
