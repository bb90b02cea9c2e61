"""Run the tests that need a GPU and record the outcome of each in ``bench/results/<gpu>/tests.json``.

    python bench/gpu_tests.py                 # all of them
    python bench/gpu_tests.py -n 15 -k decode   # arguments are pytest's
    OUTCOMES=file.json python bench/gpu_tests.py

An outcome is saved as soon as it is known. A run that was stopped goes on: what has passed at this commit is not run
again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ledger import Ledger
from record import folder, provenance


class Outcomes:
    """A plugin of pytest.

    Args:
        path: Where outcomes are kept.
        saves: Whether this process hears of all of them.
    """

    def __init__(self, path: Path, saves: bool):
        self.saves = saves
        self.ledger = Ledger(path, provenance("pytest -m gpu"), renew=True, identity=("test",))
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what has passed; forget tests that are no more."""
        if config.args_source is not config.ArgsSource.ARGS and not config.option.keyword:  # all were collected
            names = {item.nodeid for item in items}
            self.ledger.rows = [row for row in self.ledger.rows if row["test"] in names]
        rows = {row["test"]: row for row in self.ledger.rows}
        done = [i for i in items if self.ledger.has({"test": i.nodeid}) and rows[i.nodeid]["outcome"] == "passed"]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After setup, call and teardown of each test."""
        row = self.rows.setdefault(report.nodeid, {"test": report.nodeid, "seconds": 0.0, "outcome": "passed"})
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if not report.passed:
            row["outcome"] = report.outcome
        if report.failed:
            row["error"] = report.longreprtext[-2000:]
        if report.when == "teardown" and self.saves:
            self.ledger.add([row])


def pytest_configure(config: pytest.Config) -> None:
    """Here and in every worker."""
    worker = hasattr(config, "workerinput")  # of pytest-xdist
    config.pluginmanager.register(Outcomes(Path(os.environ["OUTCOMES"]), saves=not worker))


if __name__ == "__main__":
    os.environ.setdefault("OUTCOMES", str(folder() / "tests.json"))
    sys.exit(pytest.main(["-q", "-m", "gpu", "-p", "gpu_tests", *sys.argv[1:]]))
