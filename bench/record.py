"""What every result file says about where it came from.

Where the tree travelled without its git folder, the environment variable COMMIT names what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from gptq_triton.product import gpu_name

RESULTS = Path(__file__).parent / "results"


def provenance(method: str) -> dict[str, Any]:
    """Commit, machine and versions; ``method`` says how the rows were measured."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": os.environ.get("COMMIT") or _run("git", "rev-parse", "HEAD"),
        "dirty": bool(_run("git", "status", "--porcelain", "--untracked-files=no")),
        "gpu": gpu,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "method": method,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result file, whole or not at all; flat rows take a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    rows = content.get("rows", [])
    text = json.dumps(content, indent=1)
    if rows and not any(isinstance(value, (dict, list)) for row in rows for value in row.values()):
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        text = json.dumps(content | {"rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {lines}\n ]')
    fresh.write_text(text + "\n")
    os.replace(fresh, path)


def folder() -> Path:
    """Where results of this machine go: ``bench/results/<gpu or cpu>``."""
    if not torch.cuda.is_available():
        return RESULTS / "cpu"
    return RESULTS / gpu_name(torch.cuda.current_device())


def _run(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
