"""What an eager call costs on the host: ``QuantLinear(x)`` against ``nn.Linear(x)``, M = 1.

    python bench/host.py

Calls are timed in batches that are short enough for the GPU's queue never to fill, so that nothing waits for
the GPU; the two layers take turns, and medians are kept.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from cases import Case, only
from ledger import Ledger
from record import folder, provenance
from torch import nn
from weights import dense, random_weight

from gptq_triton import QuantLinear

METHOD = (
    "time.perf_counter over batches of 100 unsynchronized calls, the GPU idle before each; layers take turns; "
    "median of 61 batches; with gradients off, and with gradients on but none needed"
)
BATCH, BATCHES = 100, 61
CASES = [Case("host", 1, N, K, bits) for bits in (4, 8, 3, 2) for N, K in ((4096, 4096), (28672, 4096))]


def host_us(calls: Mapping[str, Callable[[], Any]], synchronize: Callable[[], None]) -> dict[str, float]:
    """Median microseconds that each call takes to return."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(BATCH):
            call()
    for _ in range(BATCHES):
        for name, call in calls.items():
            synchronize()
            began = time.perf_counter()
            for _ in range(BATCH):
                call()
            times[name].append((time.perf_counter() - began) / BATCH * 1e6)
    synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="KEY=A,B", help="model, shape, m, bits, group, dtype, act_order"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ledger = Ledger(options.out or folder() / "host.json", provenance(METHOD), renew=True)
    for case in only(CASES, options.only):
        weight = random_weight(case, "cuda")
        layer = QuantLinear.from_packed(weight)
        linear = nn.Linear(case.K, case.N, bias=False, device="meta")
        linear.weight = nn.Parameter(dense(weight, torch.float16), requires_grad=False)
        x = torch.randn(1, case.K, device="cuda", dtype=torch.float16)
        calls = {"QuantLinear": lambda: layer(x), "nn.Linear": lambda: linear(x)}  # noqa: B023 - called here only
        for op, gradients in (("host", False), ("host_grad", True)):
            with torch.set_grad_enabled(gradients):
                times = host_us(calls, torch.cuda.synchronize)
            print(f"{op} w{case.bits} {case.N}x{case.K}", {name: round(us, 2) for name, us in times.items()})
            ledger.add(asdict(case) | {"op": op, "provider": name, "us": round(us, 3)} for name, us in times.items())


if __name__ == "__main__":
    main()
