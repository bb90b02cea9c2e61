"""QuantEmbedding: a quantized table of vectors, stored as the linear layer that it is of one-hot vectors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantLinear, make_quant
from .packing import PackedWeight, trivial_g_idx, unpack


class QuantEmbedding(QuantLinear):
    """An embedding whose vectors are 2-, 3-, 4- or 8-bit codes with a scale and zero point per group.

    Its tensors are those of a QuantLinear with the width of a vector as in-features and the vocabulary as
    out-features, as a quantized output head has them. It runs from that form on every device.

    Args:
        bits: 2, 3, 4 or 8.
        groupsize: Numbers of a vector per group; -1 for all of them.
        infeatures: Width of a vector.
        outfeatures: Vectors.
        factor: What vectors are multiplied by, as Gemma does.
        output_dtype: Of the vectors; default: that of the scales.
        options: Further arguments of :class:`QuantLinear`.
    """

    def __init__(
        self,
        bits: int,
        groupsize: int,
        infeatures: int,
        outfeatures: int,
        *,
        factor: float = 1.0,
        output_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        super().__init__(bits, groupsize, infeatures, outfeatures, **options)
        self.factor, self.output_dtype = factor, output_dtype

    def prepare(self) -> None:
        """Keep the checkpoint form, from which single vectors can be read."""

    def forward(self, x: Tensor) -> Tensor:
        """The vectors of token ids x (...), as (..., width)."""
        weight, ids = self.weight_packed, x.flatten()
        rows = trivial_g_idx(weight.K, weight.spec.group_size, x.device) if weight.g_idx is None else weight.g_idx
        codes = unpack(weight.qweight[:, ids], weight.spec.bits, weight.K)
        scales = weight.scales[:, ids]
        wide = torch.promote_types(scales.dtype, torch.float32)
        vectors = (codes.to(wide) - _zeros(weight, ids).to(wide)[rows]) * scales.to(wide)[rows]
        dtype = self.output_dtype or scales.dtype
        vectors = vectors.t().to(dtype)
        if self.factor != 1.0:
            vectors = vectors * torch.tensor(self.factor, dtype=dtype, device=x.device)
        return vectors.reshape(*x.shape, self.infeatures)


def make_layers(module: nn.Module, names: Collection[str], bits: int, groupsize: int, **options: Any) -> None:
    """Replace linear layers and embeddings by empty quantized ones, in place, ready for a state dict.

    Args:
        module: Where they are.
        names: Dotted names.
        bits: 2, 3, 4 or 8.
        groupsize: Input rows per group; -1 for all of them.
        options: Further arguments of :class:`QuantLinear`.

    Raises:
        ValueError: A name matches no layer.
        TypeError: A named layer is of another kind.
    """
    paths = dict(module.named_modules(remove_duplicate=False))
    tables = [name for name in names if isinstance(paths.get(name), nn.Embedding)]
    make_quant(module, [name for name in names if name not in tables], bits, groupsize, **options)
    for name in tables:
        module.set_submodule(name, empty_embedding(paths[name], bits, groupsize, **options))


def empty_embedding(layer: nn.Module, bits: int, groupsize: int, **options: Any) -> QuantEmbedding:
    """A QuantEmbedding for the vectors of a floating embedding.

    Raises:
        TypeError: The layer does more than look vectors up and multiply them.
    """
    factor = getattr(layer, "scalar_embed_scale", None)
    if not isinstance(layer, nn.Embedding) or (type(layer) is not nn.Embedding and factor is None):
        raise TypeError(f"expected nn.Embedding, got {type(layer).__name__}")
    if layer.max_norm is not None:
        raise TypeError("an embedding with max_norm changes its weight when it is used; it cannot be quantized")
    weight = layer.weight
    own = {"dtype": weight.dtype, "device": weight.device, "output_dtype": weight.dtype, "factor": factor or 1.0}
    return QuantEmbedding(bits, groupsize, layer.embedding_dim, layer.num_embeddings, **(own | options))


def stand_in(module: nn.Module, weight: PackedWeight, bias: Tensor | None) -> QuantLinear:
    """The quantized layer that takes a module's place: an embedding for an embedding."""
    if not isinstance(module, (nn.Embedding, QuantEmbedding)):
        return QuantLinear.from_packed(weight, bias)
    like = (
        module if isinstance(module, QuantEmbedding) else empty_embedding(module, weight.spec.bits, -1, device="meta")
    )
    made: Any = QuantEmbedding.from_packed(weight, bias)
    made.factor, made.output_dtype = like.factor, like.output_dtype
    return made


def untie(model: nn.Module, names: Collection[str]) -> None:
    """Forget that weights of a transformers model are shared, because a quantized layer shares none.

    Args:
        model: A transformers model.
        names: Of modules that are, or will be, quantized. A floating module that shared its weight with one of
            them keeps it.
    """
    shared: Any = getattr(model, "all_tied_weights_keys", {})
    gone = [key for key, source in shared.items() if {key.rpartition(".")[0], source.rpartition(".")[0]} & {*names}]
    for key in gone:
        del shared[key]
    if gone:
        config: Any = model.config
        for about in (config, config.get_text_config()):
            about.tie_word_embeddings = False


def _zeros(weight: PackedWeight, ids: Tensor) -> Tensor:
    """The zero points (G, len(ids)) of some columns."""
    bits, maxq = weight.spec.bits, weight.spec.maxq
    word, shift = ids.long() * bits // 32, ids.long() * bits % 32
    low = weight.qzeros[:, word].long() & 0xFFFFFFFF
    high = weight.qzeros[:, (word + 1).clamp(max=weight.qzeros.shape[1] - 1)].long() & maxq  # 3 bits cross words
    return (((low | high << 32) >> shift) + weight.zero_offset) & maxq
