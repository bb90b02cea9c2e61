"""Result files, read: rows by case, ratios, geometric means."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ledger import IDENTITY

Cell = dict[str, dict[str, Any]]


def cells(rows: Iterable[dict[str, Any]]) -> dict[tuple, Cell]:
    """Case to provider to row, of rows that were timed; every provider of a case was timed in the same run.

    Where a case was measured in several runs, the latest that has our row counts.
    """
    timed = [row for row in rows if "us" in row]
    run = {_case(row): row.get("run", 0) for row in timed if row["provider"] == "ours"}
    found: dict[tuple, Cell] = {}
    for row in timed:
        key = _case(row)
        if row.get("run", 0) == run.get(key):
            found.setdefault(key, {})[row["provider"]] = row
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a result file; none if it does not exist."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def speedup(cell: Cell, peer: str) -> float | None:
    """How many times faster than a peer; None if it was not measured."""
    return cell[peer]["us"] / cell["ours"]["us"] if peer in cell else None


def mean_speedup(found: Iterable[Cell], peer: str) -> float:
    """Geometric mean over the cases in which both were measured; NaN if there is none."""
    return geomean(ratio for cell in found if (ratio := speedup(cell, peer)) is not None)


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """A line for each width and M."""
    groups: dict[tuple, list[Cell]] = {}
    for cell in cells(rows).values():
        row = cell["ours"]
        groups.setdefault((row["op"], -row["bits"], row["M"]), []).append(cell)
    lines = [f"{'':28}{'cases':>6}{'of floor':>9}{'x cublas':>9}{'x humming':>10}{'worst':>7}"]
    for (op, bits, M), group in sorted(groups.items()):
        ratios = [ratio for cell in group if (ratio := speedup(cell, "humming")) is not None]
        lines.append(
            f"{f'{op} {-bits} bits, M = {M}':28}{len(group):6}"
            f"{geomean(cell['ours']['of_floor'] for cell in group):9.2f}{mean_speedup(group, 'cublas'):9.2f}"
            f"{geomean(ratios):10.2f}{min(ratios, default=math.nan):7.2f}"
        )
    return "\n".join(lines)


def _case(row: dict[str, Any]) -> tuple:
    return tuple(row.get(name) for name in IDENTITY if name != "provider")
