"""Run the tests that need a GPU and record the outcome of each in ``bench/results/<gpu>/tests.json``."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from record import RESULTS, folder, provenance, write


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}", *sys.argv[1:]]
        code = subprocess.run(command, cwd=RESULTS.parent.parent).returncode
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    tests = [
        {"name": case.get("name"), "seconds": float(case.get("time") or 0), "outcome": _outcome(case)}
        for case in suite.iter("testcase")
    ]
    counts = {kind: sum(test["outcome"] == kind for test in tests) for kind in ("passed", "failed", "skipped")}
    result = provenance("pytest -m gpu") | counts | {"seconds": float(suite.get("time") or 0), "rows": tests}
    write(folder() / "tests.json", result)
    return code


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    return "skipped" if case.find("skipped") is not None else "passed"


if __name__ == "__main__":
    sys.exit(main())
