"""20,000 damaged checkpoints, 100 killed processes and a full disk (``tests/fuzzing.py``, ``tests/killing.py``).

The full disk is a small file system in memory, which takes root to mount; without, it is left out.
"""

from __future__ import annotations

import collections
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, provenance, write

sys.path.insert(0, str(Path(__file__).parent.parent))
from gptq_triton import QuantizeConfig, quantize_model, save_quantized
from tests import fuzzing, killing
from tests.tiny import batches, tiny

CASES, KILLS = 20_000, 50


def main() -> None:
    """All parts, or those named on the command line; each has its own provenance."""
    torch.set_num_threads(1)
    parts = {"killed": kill, "full disk": fill, "damaged": damage}
    path = RESULTS / "cpu" / "robustness.json"
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as scratch:
            found = provenance(f"python bench/robustness.py '{name}'") | {"outcome": parts[name](Path(scratch))}
        rows = json.loads(path.read_text())["rows"] if path.exists() else {}
        write(path, {"rows": rows | {name: found}})
        print(name, found["outcome"], flush=True)


def damage(home: Path) -> dict[str, Any]:
    """Every case of seeds 0 to CASES - 1; a crash or a difference is counted and shown, not raised."""
    fuzzing.make_bases(home)
    found: collections.Counter[str] = collections.Counter(loaded=0, refused=0, crashes=0, hangs=0, differences=0)
    slowest, started = 0.0, time.perf_counter()
    for seed in range(CASES):
        before = time.perf_counter()
        try:
            found[fuzzing.run_case(home, seed, home / "scratch" / "m")] += 1
        except AssertionError as error:
            found["differences"] += 1
            print(f"seed {seed}: {error}", file=sys.stderr)
        except fuzzing.Hang as error:
            found["hangs"] += 1
            print(f"seed {seed}: {error}", file=sys.stderr)
        except Exception as error:
            found["crashes"] += 1
            print(f"seed {seed}: {error!r}", file=sys.stderr)
        slowest = max(slowest, time.perf_counter() - before)
    return {
        "cases": CASES,
        **found,
        "seconds": round(time.perf_counter() - started),
        "slowest_case_seconds": round(slowest, 2),
        "peak_resident_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }


def kill(home: Path) -> dict[str, Any]:
    """KILLS saves and KILLS quantizations; a folder that is neither old nor new raises."""
    return {
        "save": {"runs": KILLS, **killing.kill_saves(home, KILLS)},
        "quantize": {"runs": KILLS, **killing.kill_quantizations(home, KILLS)},
    }


def fill(home: Path) -> dict[str, Any] | None:
    """Save over an old folder on a disk that is too small for two."""
    disk = home / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        return None
    try:
        model = tiny("llama")
        quantize_model(model, batches(1), QuantizeConfig(4, 32), method="rtn", progress=False)
        save_quantized(model, disk / "m")
        before = killing.contents(disk / "m")
        try:
            save_quantized(model, disk / "m")
        except OSError as error:
            message = str(error).replace(str(home), "")
        else:
            raise AssertionError("the disk was large enough")
        return {
            "message": message,
            "folder unchanged": killing.contents(disk / "m") == before,
            "left beside it": len(list(disk.iterdir())) - 1,
        }
    finally:
        subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    main()
