"""Part of a quantized weight as a quantized weight: whole rows of the checkpoint are read, no more than are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_triton.packing import (
    RUN,
    PackedWeight,
    check_g_idx,
    pack,
    pack_zeros,
    trivial_g_idx,
    unpack,
    unpack_zeros,
    words,
)
from gptq_triton.spec import QuantSpec


def chunk(size: int, rank: int, ranks: int, field: str = "size") -> range:
    """What one of several ranks holds of a dimension; the split is that of torch.chunk and DTensor.

    Raises:
        ValueError: A rank would hold nothing.
    """
    each = -(-size // ranks)
    if each * (ranks - 1) >= size:
        raise ValueError(f"{field} is {size}, which leaves one of {ranks} ranks without any")
    return range(rank * each, min((rank + 1) * each, size))


def cut(
    parts: Mapping[str, Any],
    spec: QuantSpec,
    shape: tuple[int, int],
    checkpoint_format: str,
    rows: range | None = None,
    columns: Sequence[range] | None = None,
) -> tuple[PackedWeight, Tensor | None]:
    """Some rows and columns of a weight, and of its bias.

    A part that starts inside a group, or whose rows come in no order, gets a ``g_idx`` of its own; codes
    that share a word with others are packed anew. Dequantized, it is exactly that part of the whole.

    Args:
        parts: ``qweight``, ``qzeros``, ``scales`` and optionally ``g_idx`` and ``bias`` of the whole, as tensors
            or as slices of a safetensors file, of which only what is needed of ``qweight`` is read.
        spec: Of the whole.
        shape: (K, N) of the whole.
        checkpoint_format: How zero points are stored.
        rows: Rows of W (inputs) to keep; default: all.
        columns: Runs of columns of W (outputs) to keep, in order; default: all.

    Raises:
        ValueError: ``g_idx`` points outside the groups.
    """
    K, N = shape
    rows = range(K) if rows is None else rows
    columns = [range(N)] if columns is None else columns
    chosen = torch.cat([torch.arange(run.start, run.stop) for run in columns])
    bias = parts["bias"][:][chosen] if "bias" in parts else None
    scales, zeros = parts["scales"][:], unpack_zeros(parts["qzeros"][:], spec.bits, N, checkpoint_format)
    scales, zeros = scales[:, chosen.to(scales.device)], zeros[:, chosen.to(zeros.device)]
    g_idx = None
    if "g_idx" in parts:
        g_idx = parts["g_idx"][:].to(torch.int32)
        check_g_idx(g_idx, K, spec.groups(K))
    part, groups, g_idx = _groups(g_idx, spec, K, rows)
    return PackedWeight(
        qweight=_words(parts["qweight"], spec.bits, rows, columns),
        scales=scales[groups],
        qzeros=pack_zeros(zeros[groups], spec.bits, checkpoint_format),
        g_idx=g_idx,
        spec=part,
        K=len(rows),
        checkpoint_format=checkpoint_format,
    ).validate(), bias


def _words(qweight: Any, bits: int, rows: range, columns: Sequence[range]) -> Tensor:
    """The codes of these rows and columns, packed."""
    first = rows.start // RUN * RUN
    span = slice(words(first, bits), words(rows.stop, bits))
    found = torch.cat([qweight[span, run.start : run.stop] for run in columns], 1)
    if rows.start == first and rows.stop * bits % 32 == 0:
        return found
    held = found.shape[0] * 32 // bits
    return pack(unpack(found, bits, held)[rows.start - first : rows.stop - first], bits)


def _groups(g_idx: Tensor | None, spec: QuantSpec, K: int, rows: range) -> tuple[QuantSpec, Tensor, Tensor | None]:
    """The part's spec, its groups as numbers in the whole, and its g_idx."""
    size = spec.rows_per_group(K)
    trivial = g_idx is None or torch.equal(g_idx, trivial_g_idx(K, spec.group_size, g_idx.device))
    if trivial and rows.start % size == 0:
        groups = torch.arange(rows.start // size, -(-rows.stop // size))
        return spec, groups, None
    whole = trivial_g_idx(K, spec.group_size) if g_idx is None else g_idx
    groups, own = whole[rows.start : rows.stop].unique(return_inverse=True)
    # the largest size that makes so many groups of the part; if it makes more, the last group fills them up
    count, length = len(groups), len(rows)
    own_size = -1 if count == 1 else (length - 1) // (count - 1)
    part = QuantSpec(spec.bits, own_size, spec.sym, desc_act=True)
    spare = groups.new_full((part.groups(length) - count,), int(groups[-1]))
    return part, torch.cat([groups, spare]).long(), own.to(torch.int32)
