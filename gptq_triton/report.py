"""An inspection as text and as a picture."""

from __future__ import annotations

from pathlib import Path

from .atomic import renamed
from .findings import LOSSLESS, LOST, Finding
from .health import SCALE_BINS
from .inspection import Inspection, LayerInfo

PROOF = {
    "tensors": "proven by its zero points",
    "writer": "as its writer stores them",
    "label": "as labelled",
    "user": "as asked for",
}
SHOWN = 3  # names of layers that share a finding


def as_text(found: Inspection) -> str:
    """What a person wants to know, the worst layers first where a full-precision model was beside it."""
    lines = [f"{found.path}: GPTQ, {len(found.layers)} quantized layers, {found.bytes / 1e6:.1f} MB"]
    if found.config:
        label, sym, desc_act = found.checkpoint_format, found.config["sym"], found.config["desc_act"]
        lines.append(f"labelled {label!r}, sym={sym}, desc_act={desc_act}")
    kinds: dict[tuple, int] = {}
    for layer in found.layers:
        key = (layer.bits, layer.group_size, layer.act_order, layer.dialect, layer.evidence)
        kinds[key] = kinds.get(key, 0) + 1
    for (bits, group, act_order, dialect, evidence), count in kinds.items():
        order = "act-order" if act_order else "groups in order"
        lines.append(
            f"  {count} layers: {bits} bits, groups of {group}, {order}, zero points {dialect} ({PROOF[evidence]})"
        )
    lines += ["", *_table(found.layers), ""]
    sections = {
        "damaged, information lost": [f for f in found.findings if f.repair == LOST or f.kind == "error"],
        "mended without loss by `gptq-triton convert --repair`": [f for f in found.findings if f.repair == LOSSLESS],
        "suspicious": [f for f in found.findings if not f.repair and f.kind != "error"],
    }
    for title, findings in sections.items():
        if findings:
            lines += [f"{title}:", *(f"  {line}" for line in _grouped(findings))]
    if not found.findings:
        lines.append("nothing suspicious was found")
    return "\n".join(lines)


def draw(found: Inspection, path: Path) -> None:
    """A PNG: each layer's error (its saturated codes where there is no reference), and a histogram of the scales.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subplots(2)
    errors = [layer.error for layer in found.layers]
    known = any(error is not None for error in errors)
    values = [(layer.error or 0.0) if known else layer.saturated for layer in found.layers]
    top.bar(range(len(values)), values, width=0.9)
    top.set_ylabel("relative error" if known else "share of codes at one end")
    top.set_xlabel("layer")
    for index in sorted(range(len(values)), key=lambda index: -values[index])[:SHOWN]:
        top.bar([index], [values[index]], width=0.9, label=f"{found.layers[index].name}: {values[index]:.3g}")
    if values:
        top.legend(title="worst", fontsize=8)
    top.set_title(f"{found.path}: {len(found.layers)} layers")
    bottom.stairs(found.scale_histogram, SCALE_BINS, fill=True)
    used = [index for index, count in enumerate(found.scale_histogram) if count]
    if used:
        bottom.set_xlim(SCALE_BINS[max(used[0] - 2, 0)], SCALE_BINS[min(used[-1] + 3, len(SCALE_BINS) - 1)])
    bottom.set_yscale("symlog")
    bottom.set_xlabel("log10 of the scale")
    bottom.set_ylabel("scales")
    with renamed(path) as fresh:
        figure.savefig(fresh, format="png", dpi=120)


def _table(layers: list[LayerInfo]) -> list[str]:
    compared = any(layer.error is not None for layer in layers)
    if compared:
        layers = sorted(layers, key=lambda layer: -(layer.error or 0.0))
    width = max((len(layer.name) for layer in layers), default=5)
    title = f"{'layer':<{width}} bits group    in x out     order zeros    at ends  scales"
    lines = [title + f"{'error':>24}" * compared]
    for layer in layers:
        error = "" if layer.error is None else f"{layer.error:12.5f}"
        shape = f"{layer.in_features} x {layer.out_features}"
        low, high = layer.scale_min, layer.scale_max
        scales = "none is finite" if low is None or high is None else f"{low:.1e} to {high:.1e}"
        order = "act" if layer.act_order else "in"
        lines.append(
            f"{layer.name:<{width}} {layer.bits:>4} {layer.group_size:>5} {shape:>13} {order:>7}"
            f" {layer.dialect:<8} {layer.saturated:7.1%}  {scales:<18}{error}"
        )
    return lines


def _grouped(findings: list[Finding]) -> list[str]:
    """One line for each gist, with the layers it is about."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.gist, []).append(finding)
    lines = []
    for alike in groups.values():
        names = ", ".join(finding.layer for finding in alike[:SHOWN])
        more = f" and {len(alike) - SHOWN} more" if len(alike) > SHOWN else ""
        lines.append(f"finding: {names}{more}{': ' if names else ''}{alike[0].text}")
    return lines
