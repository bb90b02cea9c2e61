"""Draw ``speedup.svg`` and ``floor.svg`` beside the result files they are made from.

python bench/plots.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cases import Case
from reading import Cell, cells, fractions, geomean, read, speedups
from tables import GPU, WIDTHS

COLOURS = {8: "#4477aa", 4: "#228833", 3: "#ccbb44", 2: "#ee6677"}


def curves(found: Mapping[Case, Cell], value: Callable[[Mapping[Case, Cell]], Mapping[Case, float]]) -> dict[int, list]:
    """Width to points (M, geometric mean over the shapes)."""
    values = value(found)
    lines = {}
    for bits in WIDTHS:
        rows = sorted({case.M for case in values if case.bits == bits})
        points = [(M, geomean(v for case, v in values.items() if (case.bits, case.M) == (bits, M))) for M in rows]
        if points:
            lines[bits] = points
    return lines


def draw(path: Path, lines: dict[int, list], title: str, baseline: float) -> None:
    """Write an SVG that is the same for the same points."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "gptq_triton",
        "svg.fonttype": "none",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
    }
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    for bits, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=f"{bits} bits", color=COLOURS[bits], marker="o", markersize=3)
    axes.axhline(baseline, color="#888888", linewidth=0.8)
    axes.set_xscale("log", base=2)
    ticks: list[Any] = sorted({M for points in lines.values() for M, _ in points if M & (M - 1) == 0})
    axes.set_xticks(ticks, [str(M) for M in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M, rows of x")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main(folder: Path = GPU) -> None:
    # M = 64 is in both files; the one measured with the other prefill sizes counts
    found = cells(read(folder / "decode.json")["rows"]) | cells(read(folder / "prefill.json")["rows"])
    if not found:
        raise SystemExit(f"{folder} has neither decode.json nor prefill.json")
    draw(
        folder / "speedup.svg",
        curves(found, lambda group: speedups(group, "cublas")),
        "Speed-up over cuBLAS in fp16, geometric mean over the shapes",
        1,
    )
    draw(
        folder / "floor.svg",
        curves(found, fractions),
        "Fraction of the floor (bandwidth or tensor cores), geometric mean over the shapes",
        1,
    )


if __name__ == "__main__":
    main()
