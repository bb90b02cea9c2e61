"""Layers that an engine joins side by side (q, k and v): as one weight where groups allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gptq_triton.config import QuantizeConfig
from gptq_triton.packing import RUN, PackedWeight, pack_zeros, symmetric_format, unpack_zeros, words

from .sharding import cut


@dataclass(eq=False)
class Piece:
    """One rank's part of one checkpoint layer, taken tensor by tensor as they come, so that no whole layer is kept.

    Attributes:
        config: Of the layer.
        shape: (K, N) of the whole layer.
        rows: Inputs to keep.
        columns: Outputs to keep, in order.
        parts: What has come.
    """

    config: QuantizeConfig
    shape: tuple[int, int]
    rows: range
    columns: Sequence[range]
    parts: dict[str, Any] = field(default_factory=dict)

    def take(self, part: str, tensor: Tensor, device: torch.device | str) -> None:
        """Keep what is needed of one tensor of the checkpoint."""
        if part != "qweight":
            self.parts[part] = tensor.to(device)
            return
        K, N = self.shape
        bits = self.config.bits
        if tuple(tensor.shape) != (words(K, bits), N):
            raise ValueError(f"qweight must have shape {(words(K, bits), N)}, got {tuple(tensor.shape)}")
        first = words(self.rows.start // RUN * RUN, bits)
        runs = {run: tensor[first : words(self.rows.stop, bits), run.start : run.stop] for run in self.columns}
        self.parts[part] = _Held(first, {run: kept.to(device) for run, kept in runs.items()})

    def weight(self) -> PackedWeight:
        """This rank's part.

        Raises:
            ValueError: A tensor did not come, or does not fit.
        """
        missing = [part for part in ("qweight", "qzeros", "scales") if part not in self.parts]
        if missing:
            raise ValueError(f"{', '.join(missing)} did not come with the checkpoint")
        spec, label = self.config.spec(), self.config.checkpoint_format
        K, N = self.shape
        qzeros = self.parts["qzeros"]
        if spec.sym:
            empty = torch.empty(0, N, dtype=torch.int32)
            label = symmetric_format(PackedWeight(empty, empty, qzeros, None, spec, K)) or label
        found, _ = cut(self.parts, spec, (K, N), label, self.rows, self.columns)
        return found


def side_by_side(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Weights with one input as one weight, where their groups are the same; else as they are."""
    first = weights[0]
    alike = all(_grouping(weight) == _grouping(first) and _same_order(weight, first) for weight in weights)
    if len(weights) == 1 or not alike:
        return list(weights)
    zeros = [unpack_zeros(w.qzeros, w.spec.bits, w.N, w.checkpoint_format) for w in weights]
    dtype = torch.promote_types(first.scales.dtype, weights[-1].scales.dtype)
    joined = replace(
        first,
        qweight=torch.cat([weight.qweight for weight in weights], 1),
        scales=torch.cat([weight.scales.to(dtype) for weight in weights], 1),
        qzeros=pack_zeros(torch.cat(zeros, 1), first.spec.bits, "gptq_v2"),
        checkpoint_format="gptq_v2",
    )
    return [joined.validate()]


def is_orphan(fields: Mapping[str, Any]) -> bool:
    """Whether vLLM's own GPTQ method refuses a checkpoint, or reads it wrong: all but symmetric 4- and 8-bit v1.

    Raises:
        ValueError: It is no GPTQ checkpoint.
    """
    config = QuantizeConfig.from_dict(fields)
    rules = [rule for pattern, rule in config.dynamic.items() if not pattern.startswith("-:")]
    ruled = (replace(config, dynamic={"": rule}).for_module("any") for rule in rules)
    kinds = [config, *(kind for kind in ruled if kind is not None)]
    return config.checkpoint_format != "gptq" or any(
        kind.bits not in (4, 8) or not kind.sym or (kind.desc_act and kind.group_size != -1) for kind in kinds
    )


class _Held:
    """Some rows and columns of a tensor, indexed as the whole is."""

    def __init__(self, first: int, runs: Mapping[range, Tensor]):
        self.first, self.runs = first, runs

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        rows, columns = index
        return self.runs[range(columns.start, columns.stop)][rows.start - self.first : rows.stop - self.first]


def _grouping(weight: PackedWeight) -> tuple[int, int, int]:
    return weight.spec.bits, weight.spec.group_size, weight.K


def _same_order(a: PackedWeight, b: PackedWeight) -> bool:
    if a.g_idx is None or b.g_idx is None:
        return a.g_idx is b.g_idx
    return torch.equal(a.g_idx, b.g_idx)
