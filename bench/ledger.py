"""A result file that grows: a run adds its rows, and a run that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import write

IDENTITY = ("provider", "op", "M", "N", "K", "bits", "group_size", "sym", "act_order", "dtype")


class Ledger:
    """Rows of one result file, each of them saved as soon as it is known.

    Rows say in ``run`` which entry of ``runs`` made them: its commit, machine and ceilings.

    Args:
        path: The file; it may not exist yet.
        run: What the present run says about itself.
        retry: Measure again what failed.
        renew: Measure again what another commit measured.
        identity: The fields that tell one row from another.
    """

    def __init__(
        self,
        path: Path,
        run: dict[str, Any],
        *,
        retry: bool = False,
        renew: bool = False,
        identity: tuple[str, ...] = IDENTITY,
    ):
        self.path, self.identity = path, identity
        found = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[dict] = [*found.get("runs", []), run]
        self.rows: list[dict] = found.get("rows", [])
        self._fresh = {
            self._key(row)
            for row in self.rows
            if not (retry and "error" in row) and not (renew and not self.of_this_commit(row))
        }

    def of_this_commit(self, row: dict[str, Any]) -> bool:
        """Whether the commit of the present run made this row."""
        return self.runs[row["run"]]["commit"] == self.runs[-1]["commit"]

    def has(self, row: dict[str, Any]) -> bool:
        """Whether this provider's row of this case needs no measurement."""
        return self._key(row) in self._fresh

    def again(self, rows: Iterable[dict[str, Any]]) -> None:
        """Measure these rows again."""
        self._fresh -= {self._key(row) for row in rows}

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the rows of one case, in place of older ones, and save."""
        fresh = [row | {"run": len(self.runs) - 1} for row in rows]
        keys = {self._key(row) for row in fresh}
        self._fresh |= keys
        self.rows = [row for row in self.rows if self._key(row) not in keys] + fresh
        write(self.path, self.runs[-1] | {"runs": self.runs, "rows": self.rows})

    def _key(self, row: dict[str, Any]) -> tuple:
        return tuple(row.get(name) for name in self.identity)


def compare(rows: list[dict[str, Any]]) -> None:
    """Write into the rows of one case how they stand against cuBLAS and against the best other one."""
    times = {row["provider"]: row["us"] for row in rows if "us" in row}
    for row in rows:
        if "us" not in row:
            continue
        if "cublas" in times:
            row["vs_cublas"] = round(times["cublas"] / row["us"], 3)
        peers = [us for name, us in times.items() if name not in ("ours", row["provider"])]
        if peers:
            row["vs_best_peer"] = round(min(peers) / row["us"], 3)
