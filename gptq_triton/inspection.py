"""What a checkpoint is and what is wrong with it, told without building its model, in bounded memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import unreplaced
from .comparison import Reference
from .config import read_config
from .dialects import detect
from .files import open_checkpoint
from .findings import Claim, Finding, Layout, config_findings, file_claim
from .health import SCALE_BINS, Health, centre_findings, examine
from .parts import LayerParts, layer_parts
from .zeros import FORMS


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer of a checkpoint.

    Attributes:
        name: Full module name.
        bits: Width.
        group_size: Rows per group; -1 for one group.
        in_features: K.
        out_features: N.
        act_order: Whether g_idx says more than "groups in order".
        dialect: "v1", "v2" or "v1-words".
        evidence: Why: "tensors" (symmetric zero points prove it), "writer", "label" or "user".
        bytes: Size of its tensors.
        saturated: Share of codes at the commoner end of their range.
        centre: Mean code minus mean zero point, in steps.
        scale_min: Smallest finite scale; None if there is none.
        scale_max: Largest finite scale.
        error: ``||W' - W|| / ||W||`` against the full-precision weight W; None without one.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    act_order: bool
    dialect: str
    evidence: str
    bytes: int
    saturated: float
    centre: float
    scale_min: float | None
    scale_max: float | None
    error: float | None = None


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: The folder or file.
        checkpoint_format: As labelled; "" where nothing is.
        config: As read from its config files; empty for a single file.
        layers: The quantized layers that can be read.
        bytes: Size of all tensor files.
        findings: What looks wrong.
        scale_histogram: Counts of log10 |scale| in the bins of :data:`gptq_triton.health.SCALE_BINS`.
    """

    path: str
    checkpoint_format: str
    config: dict[str, Any]
    layers: list[LayerInfo]
    bytes: int
    findings: list[Finding] = field(default_factory=list)
    scale_histogram: list[int] = field(default_factory=list)


def inspect_checkpoint(
    path: str | Path, *, against: str | Path | None = None, zero_points: str | None = None
) -> Inspection:
    """Describe a GPTQ folder, or a single file of one, without building its model.

    Every tensor of the quantized layers is read once, a few megabytes at a time.

    Args:
        path: The folder or file.
        against: A folder or file with the same model in full precision, for each layer's error.
        zero_points: "v1", "v2" or "v1-words": how zero points are stored, whatever the evidence says.

    Raises:
        ValueError: There is no GPTQ checkpoint of a known format.
    """
    path = Path(path)
    with nullcontext() if path.is_file() else unreplaced(path):
        return _inspect(path, against, zero_points)


def _inspect(path: Path, against: str | Path | None, zero_points: str | None) -> Inspection:
    config = None if path.is_file() else read_config(path)
    layers: list[LayerInfo] = []
    findings: list[Finding] = []
    histogram = np.zeros(len(SCALE_BINS) - 1, dtype=np.int64)
    with open_checkpoint(path) as files, Reference(against) as reference:
        for name, part in layer_parts(files).items():
            claim = Claim.of(config, name) if config else file_claim(part.metadata)
            try:
                layout = detect(part, claim, zero_points=zero_points)
                health = examine(part, layout)
                error = reference.error(part, layout)
            except ValueError as problem:
                findings.append(Finding(name, "error", str(problem)))
                continue
            findings += [*layout.findings, *health.findings, *_better(part, layout, reference, error, zero_points)]
            histogram += health.scale_histogram
            layers.append(_info(part, layout, health, error))
        size = sum(each.stat().st_size for each in {file.path for file in files.values()})
    if config is not None:
        findings = config_findings(path, config, [layer.act_order for layer in layers]) + findings
    return Inspection(
        path=str(path),
        checkpoint_format=config.checkpoint_format if config else "",
        config=config.to_dict() if config else {},
        layers=layers,
        bytes=size,
        findings=centre_findings([(e.dialect, e.centre) for e in layers if e.evidence == "label"]) + findings,
        scale_histogram=histogram.tolist(),
    )


def _info(part: LayerParts, layout: Layout, health: Health, error: float | None) -> LayerInfo:
    return LayerInfo(
        name=part.name,
        bits=layout.bits,
        group_size=layout.group_size,
        in_features=layout.K,
        out_features=layout.N,
        act_order=layout.act_order,
        dialect=layout.zeros,
        evidence=layout.evidence,
        bytes=sum(entry.size for entry in part.entries.values()),
        saturated=health.saturated,
        centre=health.centre,
        scale_min=health.scale_min,
        scale_max=health.scale_max,
        error=error,
    )


def _better(
    part: LayerParts, layout: Layout, reference: Reference, error: float | None, zero_points: str | None
) -> list[Finding]:
    """Another reading of the zero points that comes much nearer to the full-precision weight."""
    if error is None or layout.evidence == "tensors" or zero_points:
        return []
    others = {form: reference.error(part, replace(layout, zeros=form)) for form in FORMS if form != layout.zeros}
    best, lowest = min(others.items(), key=lambda item: item[1] or 0.0)
    if lowest is None or lowest > error / 2:
        return []
    text = f"read as {best} its error would be {lowest:.3f} instead of {error:.3f}: it is stored so"
    return [Finding(part.name, "label", text)]
