"""How one layer of a checkpoint is stored: decided from its tensors first, then from who wrote it, then its label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .findings import LOSSLESS, LOST, Claim, Finding, Layout
from .packing import SCALE_DTYPES, PackedWeight, check_g_idx, trivial_g_idx, words
from .parts import PARTS, LayerParts
from .spec import BITS, QuantSpec
from .tensorfile import Entry
from .zeros import (
    FORM_OF_LABEL,
    FORMS,
    LABEL_OF_FORM,
    V1,
    V1_WORDS,
    V2,
    convert_zeros,
    overwritten_fields,
    symmetric_form,
    wrapped_fields,
)


def detect(
    part: LayerParts,
    claim: Claim,
    *,
    shape: tuple[int, int] | None = None,
    zero_points: str | None = None,
) -> Layout:
    """Decide how one layer is stored; reads its zero points and g_idx.

    The width and the group size follow from the shapes; the claim only decides where several fit. Zero
    points of a symmetric layer prove their form. Others are read as labelled, a v1 label of GPTQModel as
    whole words.

    Args:
        part: The layer's tensors.
        claim: What the config or the caller says.
        shape: (N, K) of the model's layer, if known.
        zero_points: A form to assume whatever the evidence says; default: none.

    Raises:
        ValueError: A part is missing, or has another dtype, shape or range than it must have.
    """
    if zero_points is not None and zero_points not in FORMS:
        raise ValueError(f"zero_points must be one of {FORMS}, got {zero_points!r}")
    name, entries = part.name, part.entries
    _check_parts(entries, shape)
    rows, N = entries["qweight"].shape
    K = shape[1] if shape else entries["g_idx"].shape[0] if "g_idx" in entries else None
    bits = _bits(rows, N, entries["qzeros"].shape[1], K, claim.bits)
    K = rows * 32 // bits if K is None else K
    findings = []
    if claim.bits not in (None, bits):
        findings.append(
            Finding(name, "config", f"the config says {claim.bits} bits, the tensors hold {bits}", LOSSLESS)
        )
    G = _groups(entries, K, N, claim.group_size)
    g_idx, unset = _g_idx(part.read("g_idx") if "g_idx" in entries else None, K, G)
    if unset:
        text = f"g_idx is 0 for all inputs although there are {G} groups: nobody set it; groups are in order"
        findings.append(Finding(name, "g_idx", text, LOSSLESS))
    group_size = _group_size(K, G, g_idx, claim.group_size)
    if claim.group_size is not None and QuantSpec(bits, claim.group_size).groups(K) != G:
        text = f"the config says groups of {claim.group_size}, the tensors hold groups of {group_size}"
        findings.append(Finding(name, "config", text, LOSSLESS))
    layout = Layout(
        bits=bits,
        group_size=group_size,
        K=K,
        N=N,
        sym=claim.sym is not False,
        act_order=g_idx is not None and not torch.equal(g_idx, trivial_g_idx(K, group_size)),
        zeros=zero_points or FORM_OF_LABEL[claim.label],
        evidence="user" if zero_points else "label",
        findings=tuple(findings),
    )
    return layout if zero_points else _judge_zeros(layout, name, part.read("qzeros"), claim)


def load_packed(layout: Layout, part: LayerParts) -> tuple[PackedWeight, Tensor | None]:
    """The weight and bias of a layer as this package holds them: zero points v1 or v2, g_idx only if it matters.

    Raises:
        ValueError: A scale or a bias is not finite, or a tensor does not fit.
    """
    scales, qzeros, form = part.read("scales"), part.read("qzeros"), layout.zeros
    if form not in LABEL_OF_FORM:
        qzeros, form = convert_zeros(qzeros, layout.bits, layout.N, form, V2), V2
    bias = part.read("bias") if "bias" in part.entries else None
    for name, tensor in (("scales", scales), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    g_idx = part.read("g_idx").to(torch.int32) if layout.act_order else None
    weight = PackedWeight(part.read("qweight"), scales, qzeros, g_idx, layout.spec, layout.K, LABEL_OF_FORM[form])
    return weight.validate(), bias


def _judge_zeros(layout: Layout, name: str, qzeros: Tensor, claim: Claim) -> Layout:
    """The form of the zero points, and what is doubtful about them."""
    bits, N, form, evidence = layout.bits, layout.N, layout.zeros, "label"
    findings = list(layout.findings)
    if layout.sym and (proven := symmetric_form(qzeros, bits, N)):
        if LABEL_OF_FORM.get(proven) != claim.label:
            text = f"labelled {claim.label!r}, but its zero points are stored as {proven}"
            findings.append(Finding(name, "label", text, LOSSLESS))
        return replace(layout, zeros=proven, evidence="tensors", findings=tuple(findings))
    if claim.sym:
        text = "the config says symmetric, but its zero points are not all in the middle"
        findings.append(Finding(name, "zeros", text))
    if form == V1 and (wrapped := wrapped_fields(qzeros, bits, N)):
        if claim.gptqmodel and bits != 3:
            form, evidence = V1_WORDS, "writer"
        elif destroyed := overwritten_fields(qzeros, bits, N):
            text = (
                f"zero points of 0 were written over the rest of their words: up to {destroyed} of "
                f"{qzeros.shape[0] * N} zero points are gone, and read as 0"
            )
            findings.append(Finding(name, "zeros", text, LOST))
        else:
            text = (
                f"{wrapped} zero points of 0, which v1 writers store in different ways (and naive readers take for "
                f"{2**bits}); read field by field. If GPTQModel wrote this, ask for zero_points='v1-words'"
            )
            findings.append(Finding(name, "zeros", text))
    return replace(layout, zeros=form, evidence=evidence, findings=tuple(findings))


def _check_parts(entries: Mapping[str, Entry], shape: tuple[int, int] | None) -> None:
    for part in PARTS[:3]:
        if part not in entries:
            raise ValueError(f"{part} is missing")
        if len(entries[part].shape) != 2:
            raise ValueError(f"{part} must be a matrix, got shape {entries[part].shape}")
    wanted: dict[str, tuple[torch.dtype, ...]] = {
        **dict.fromkeys(("qweight", "qzeros"), (torch.int32,)),
        **dict.fromkeys(("scales", "bias"), SCALE_DTYPES),
        "g_idx": (torch.int32, torch.int64),
    }
    for part, entry in entries.items():
        if entry.dtype not in wanted[part]:
            names = " or ".join(map(str, wanted[part]))
            raise ValueError(f"{part} must be {names}, got {entry.dtype}")
    rows, N = entries["qweight"].shape
    if not rows or not N:
        raise ValueError(f"qweight must not be empty, got shape {(rows, N)}")
    if shape is not None and shape[0] != N:
        raise ValueError(f"qweight must have {shape[0]} columns, got {N}")
    if "bias" in entries and entries["bias"].shape != (N,):
        raise ValueError(f"bias must have shape {(N,)}, got {entries['bias'].shape}")
    if "g_idx" in entries and len(entries["g_idx"].shape) != 1:
        raise ValueError(f"g_idx must be a vector, got shape {entries['g_idx'].shape}")


def _bits(rows: int, N: int, zero_words: int, K: int | None, said: int | None) -> int:
    fits = [b for b in BITS if words(N, b) == zero_words and (rows * 32 % b == 0 if K is None else words(K, b) == rows)]
    if said in fits:
        return said
    if len(fits) == 1:
        return fits[0]
    inputs = f"{K} inputs" if K is not None else "any number of inputs"
    expected = (
        ""
        if said is None or K is None
        else (f"; {said} bits need qweight of shape {(words(K, said), N)} and {words(N, said)} columns of qzeros")
    )
    raise ValueError(
        f"{rows} rows of qweight and {zero_words} columns of qzeros fit {f'the widths {fits}' if fits else 'no width'} "
        f"for {inputs} and {N} outputs{expected}"
    )


def _groups(entries: Mapping[str, Entry], K: int, N: int, said: int | None) -> int:
    """G; where scales and qzeros disagree, the config says which of them is wrong."""
    counts = entries["qzeros"].shape[0], entries["scales"].shape[0]
    G = QuantSpec(8, said).groups(K) if said is not None else counts[0]
    G = G if G in counts else counts[0]
    for part, columns in (("qzeros", entries["qzeros"].shape[1]), ("scales", N)):
        if entries[part].shape != (G, columns):
            raise ValueError(f"{part} must have shape {(G, columns)}, got {entries[part].shape}")
    return G


def _g_idx(g_idx: Tensor | None, K: int, G: int) -> tuple[Tensor | None, bool]:
    """g_idx as int32, or None if there is none or nobody set it; and whether the latter."""
    if g_idx is None:
        return None, False
    check_g_idx(g_idx.clamp(-1, 2**31 - 1).to(torch.int32), K, G)
    if G > 1 and not bool(g_idx.any()):
        return None, True
    return g_idx.to(torch.int32), False


def _group_size(K: int, G: int, g_idx: Tensor | None, said: int | None) -> int:
    if said is not None and QuantSpec(8, said).groups(K) == G:
        return said
    if G == 1:
        return -1
    if g_idx is not None:
        largest = int(torch.bincount(g_idx).max())  # the size of every group but the last, in whatever order
        if QuantSpec(8, largest).groups(K) == G:
            return largest
    sizes = {2**i for i in range(3, 14) if QuantSpec(8, 2**i).groups(K) == G} | ({K // G} if K % G == 0 else set())
    if len(sizes) != 1:
        fits = f"the sizes {sorted(sizes)}" if sizes else "no size"
        raise ValueError(
            f"scales has {G} groups for {K} inputs, which {fits} would give"
            + ("" if said is None else f"; the config says groups of {said}")
        )
    return sizes.pop()
