"""Result files, read: rows by case, ratios, geometric means."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cases import Case
from ledger import IDENTITY

Row = dict[str, Any]
Cell = dict[str, Row]  # provider to row


def read(path: Path) -> dict[str, Any]:
    """A result file; an empty one if it does not exist."""
    return json.loads(path.read_text()) if path.exists() else {"rows": []}


def cells(rows: Iterable[Row]) -> dict[Case, Cell]:
    """Rows that were timed, by case; peers only from the run that made our row."""
    timed = [(Case(**{name: row[name] for name in IDENTITY if name != "provider"}), row) for row in rows if "us" in row]
    runs = {case: row.get("run") for case, row in timed if row["provider"] == "ours"}
    found: dict[Case, Cell] = {}
    for case, row in timed:
        if case in runs and row.get("run") == runs[case]:
            found.setdefault(case, {})[row["provider"]] = row
    return found


def speedups(found: Mapping[Case, Cell], peer: str) -> dict[Case, float]:
    """How many times faster than a peer, in the cases in which it was measured too."""
    return {case: cell[peer]["us"] / cell["ours"]["us"] for case, cell in found.items() if peer in cell}


def fractions(found: Mapping[Case, Cell]) -> dict[Case, float]:
    """The floor divided by our time."""
    return {case: cell["ours"]["of_floor"] for case, cell in found.items()}


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def summary(rows: Iterable[Row]) -> str:
    """A line for each operator, width and M."""
    groups: dict[tuple, dict[Case, Cell]] = {}
    for case, cell in cells(rows).items():
        groups.setdefault((case.op, -case.bits, case.M), {})[case] = cell
    lines = [f"{'':36}{'cases':>6}{'of floor':>9}{'x cublas':>9}{'x humming':>10}{'worst':>7}"]
    for (op, bits, M), group in sorted(groups.items()):
        humming = speedups(group, "humming").values()
        lines.append(
            f"{f'{op} {-bits} bits, M = {M}':36}{len(group):6}{geomean(fractions(group).values()):9.2f}"
            f"{geomean(speedups(group, 'cublas').values()):9.2f}"
            f"{geomean(humming):10.2f}{min(humming, default=math.nan):7.2f}"
        )
    return "\n".join(lines)
