"""Run ``gptq-triton demo`` and record its figures in ``bench/results/<gpu or cpu>/demo.json``."""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from record import folder, provenance, write

from gptq_triton import demo


def main() -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        result = demo.run(Path(scratch) / "model")
    result["total_seconds"] = round(time.perf_counter() - started, 1)
    result["peak_gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    del result["folder"]
    write(folder() / "demo.json", provenance("gptq-triton demo, after installation") | result)


if __name__ == "__main__":
    main()
