"""What the numbers of one quantized layer look like: a scan in bounded memory, and what is suspicious about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .findings import LOST, Finding, Layout
from .packing import trivial_g_idx
from .parts import LayerParts
from .zeros import V1, V2, decode_zeros

CHUNK = 2**20  # words read at a time
# Share of codes at one end of the range that no sound layer reaches. A group's extremes are at the ends, one
# each; that share, 2 / rows, comes on top. Two-bit codes have only four values.
SATURATED = {2: 0.9, 3: 0.6, 4: 0.4, 8: 0.1}
OFF_CENTRE = 0.25  # steps; how near to one whole step the centre of misread codes lies
SCALE_BINS = np.linspace(-8, 2, 101)  # of log10 |scale|


@dataclass(frozen=True, eq=False)
class Health:
    """The numbers of one layer.

    Attributes:
        counts: How often each code occurs, (2**bits,).
        saturated: Share of the commoner of the two end codes.
        centre: Mean code minus mean zero point, in steps: about 0 for weights that are read right.
        scale_min: Smallest finite scale; None if there is none.
        scale_max: Largest finite one.
        scale_histogram: Counts in :data:`SCALE_BINS`.
        findings: What is suspicious.
    """

    counts: np.ndarray
    saturated: float
    centre: float
    scale_min: float | None
    scale_max: float | None
    scale_histogram: np.ndarray
    findings: list[Finding] = field(default_factory=list)


def examine(part: LayerParts, layout: Layout) -> Health:
    """Scan one layer, stored as :func:`gptq_triton.dialects.detect` found it."""
    name, entries = part.name, part.entries
    counts = np.zeros(2**layout.bits, dtype=np.int64)
    for words in _chunks(part, layout.bits):
        counts += count_codes(words, layout.bits)
    counts[0] -= counts.sum() - layout.K * layout.N  # the fields past K, which are zero
    scales, zeros = part.read("scales").double(), decode_zeros(part.read("qzeros"), layout.bits, layout.N, layout.zeros)
    finite = torch.isfinite(scales)
    known = scales[finite]
    total = layout.K * layout.N
    g_idx = part.read("g_idx").long() if layout.act_order else trivial_g_idx(layout.K, layout.group_size).long()
    sizes = torch.bincount(g_idx, minlength=len(scales))
    mean_zero = float(zeros.double().mean(1) @ sizes.double()) / layout.K
    logs = np.log10(np.maximum(known.abs().numpy(), 1e-300))
    health = Health(
        counts=counts,
        saturated=float(max(counts[0], counts[-1])) / total,
        centre=float(counts @ np.arange(len(counts))) / total - mean_zero,
        scale_min=float(known.min()) if len(known) else None,
        scale_max=float(known.max()) if len(known) else None,
        scale_histogram=np.histogram(np.clip(logs, SCALE_BINS[0], SCALE_BINS[-1]), SCALE_BINS)[0],
    )
    tiny = torch.finfo(entries["scales"].dtype).smallest_normal
    scale_findings = {
        "NaN or infinite: the layer cannot be loaded": (~finite, LOST),
        "0: their weights are all 0": (scales == 0, ""),
        "negative, which no quantizer makes": (scales < 0, ""),
        f"below the smallest normal number of {entries['scales'].dtype}, and have lost digits": (
            (scales != 0) & (scales.abs() < tiny),
            "",
        ),
    }
    for text, (which, repair) in scale_findings.items():
        if count := int(which.sum()):
            share = f"{count} of {scales.numel()} scales are"
            health.findings.append(Finding(name, "scales", f"{share} {text}", repair))
    limit = SATURATED[layout.bits] + 2 / layout.spec.rows_per_group(layout.K)
    if health.saturated > limit:
        end = 0 if counts[0] >= counts[-1] else len(counts) - 1
        text = f"{health.saturated:.0%} of the codes are {end}, the end of their range (at most {limit:.0%} is usual)"
        health.findings.append(Finding(name, "codes", text))
    usual = torch.bincount(trivial_g_idx(layout.K, layout.group_size).long(), minlength=len(scales))
    if sorted(sizes.tolist()) != sorted(usual.tolist()):
        text = f"g_idx gives groups of {int(sizes.min())} to {int(sizes.max())} inputs, not of {int(usual.max())}"
        health.findings.append(Finding(name, "g_idx", text))
    return health


def sample_centre(part: LayerParts, layout: Layout) -> float:
    """:attr:`Health.centre` of the first million words or so."""
    counts = count_codes(next(_chunks(part, layout.bits)), layout.bits)
    inputs = min(int(counts.sum()) // layout.N, layout.K)
    counts[0] -= counts.sum() - inputs * layout.N
    zeros = decode_zeros(part.read("qzeros"), layout.bits, layout.N, layout.zeros).double().mean(1)
    g_idx = part.read("g_idx").long() if layout.act_order else trivial_g_idx(layout.K, layout.group_size).long()
    return float(counts @ np.arange(len(counts))) / (inputs * layout.N) - float(zeros[g_idx[:inputs]].mean())


def centre_findings(centres: Sequence[tuple[str, float]]) -> list[Finding]:
    """Codes lie around their zero points; off by one step, layer after layer, they are read in the wrong form.

    Args:
        centres: Form and :attr:`Health.centre` of each layer whose label alone says the form.
    """
    step = {V1: -1, V2: 1}  # where the centre lies if the other form is the right one
    off = [(form, centre) for form, centre in centres if abs(centre - step[form]) < OFF_CENTRE]
    if len(off) <= len(centres) / 2:
        return []
    other = V2 if off[0][0] == V1 else V1
    mean = sum(centre for _, centre in off) / len(off)
    text = (
        f"the codes of {len(off)} of {len(centres)} asymmetric layers lie {mean:+.2f} steps from their zero points: "
        f"they are probably stored as {other}, whatever the label says (zero_points={other!r} reads them so)"
    )
    return [Finding("", "label", text)]


def count_codes(words: Tensor, bits: int) -> np.ndarray:
    """How often each code occurs in packed words.

    Args:
        words: int32 (W, N), packed along dimension 0; for 3 bits whole runs of 3 words.
        bits: 2, 3, 4 or 8.

    Returns:
        int64 (2**bits,). Words are cut into 16 bits (3-bit runs into 12) that hold whole codes; those are
        counted, and codes from the counts: one pass, whatever the width.
    """
    raw = words.contiguous().numpy().view(np.uint32)
    if bits != 3:
        pieces, width = [raw.view(np.uint16).ravel()], 16
    else:
        w0, w1, w2 = raw[0::3], raw[1::3], raw[2::3]
        cuts = (
            *(w0, w0 >> 12, (w0 >> 24) | (w1 << 8), w1 >> 4),
            *(w1 >> 16, (w1 >> 28) | (w2 << 4), w2 >> 8, w2 >> 20),
        )
        pieces, width = [(cut & 0xFFF).astype(np.uint16).ravel() for cut in cuts], 12
    counts = sum(np.bincount(piece, minlength=2**width) for piece in pieces)
    fields = width // bits
    grid = np.asarray(counts, dtype=np.int64).reshape((2**bits,) * fields)
    return np.sum([grid.sum(tuple(a for a in range(fields) if a != axis)) for axis in range(fields)], axis=0)


def _chunks(part: LayerParts, bits: int) -> Iterator[Tensor]:
    """Whole runs of words, a bounded number at a time; a last short run is filled with zeros."""
    total, N = part.entries["qweight"].shape
    run = bits if bits == 3 else 1
    step = max(1, CHUNK // (N * run)) * run
    for start in range(0, total, step):
        words = part.rows("qweight", start, min(start + step, total))
        if missing := -len(words) % run:
            words = torch.nn.functional.pad(words, (0, 0, 0, missing))
        yield words
