"""Time of every product, against other projects and against what the machine can do.

    python bench/speed.py decode                                  # all of it, into bench/results/<gpu>/decode.json
    python bench/speed.py decode --only bits=4 m=1,16 --seconds 300
    python bench/speed.py decode --only shape=4096x4096 m=1,16,64 --providers gemlite

A run adds the cases that its file lacks and saves after each, so it may be stopped at any time and started
again; with --seconds it stops by itself. What fails is recorded with its error and is not tried again without
--retry. (The file is not called kernels.py: as a script's folder, bench/ would hide the package `kernels` that
transformers looks for.)
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from cases import SUITES, Case, Ceilings, only
from ledger import Ledger, compare
from method import METHOD, calls_of, capture, copies_of, interleaved
from providers import PROVIDERS, Provider
from reading import Row, cells, summary
from record import folder, provenance
from weights import checked_rows, error, exact, random_weight

PEERS = {
    "decode": ("ours", "cublas", "tinygemm", "humming"),
    "prefill": ("ours", "cublas", "humming"),
    "backward": ("ours", "cublas"),
    "variants": ("ours", "cublas"),
}
# seconds of work before timing: memory-bound work runs at full clocks at once, tensor cores heat up
PREHEAT, PREHEAT_COMPUTE = 0.05, 0.3
WRONG = 0.05  # a relative error that no rounding explains


class Bench:
    """All cases of one weight: the weight in every provider's form, and what the products should be."""

    def __init__(self, cases: Sequence[Case], ceilings: Ceilings, device: str = "cuda"):
        self.ceilings, self.device = ceilings, device
        case = max(cases, key=lambda case: case.M)
        self.weight = random_weight(case, device)
        features = case.K if case.op == "matmul" else case.N
        self.x = torch.randn(case.M, features, device=device, dtype=getattr(torch, case.dtype))
        self.rows = torch.cat([checked_rows(case.M) for case in cases]).unique().to(device)
        self.expected = exact(self.x[self.rows], self.weight, case.op)
        self.loaded: dict[str, list[Any]] = {}

    def measure(self, case: Case, providers: Iterable[Provider]) -> list[dict[str, Any]]:
        """One row for each provider."""
        rows, captured = {}, {}
        for provider in providers:
            row = rows[provider.name] = {"provider": provider.name, **asdict(case)}
            refusal = provider.refusal(case)
            if refusal:
                row["skipped"] = refusal
                continue
            try:
                row |= self._check(case, provider)
                captured[provider.name] = self._capture(case, provider)
            except Exception as problem:  # a peer may fail in any way; the others go on
                row["error"] = _short(problem)
                if _lost():
                    return [row]
        try:
            times = interleaved(captured, self._preheat(case)) if captured else {}
        except Exception as problem:
            for name in captured:
                rows[name]["error"] = _short(problem)
            times = {}
        for name, us in times.items():
            rows[name] |= self._figures(case, PROVIDERS[name], us)
        if "ours" in rows and "cublas" in rows:
            rows["ours"]["cublas_rel_err"] = rows["cublas"].get("rel_err")
        compare(list(rows.values()))
        return list(rows.values())

    def _layers(self, case: Case, provider: Provider) -> list[Any]:
        if provider.name not in self.loaded:
            copies = copies_of(case.weight_nbytes(provider.dense))
            self.loaded[provider.name] = provider.load(self.weight, case, copies)
        return self.loaded[provider.name]

    def _check(self, case: Case, provider: Provider) -> dict[str, Any]:
        call = provider.bind(self._layers(case, provider)[0], self.x[: case.M], case)
        at = checked_rows(case.M).to(self.device)
        rel_err = error(call()[at], self.expected[torch.searchsorted(self.rows, at)])
        if not rel_err < (1 if provider.requantizes else WRONG):
            raise ArithmeticError(f"wrong result: relative error {rel_err:.3g}")
        return {"rel_err": float(f"{rel_err:.3g}"), "plan": provider.plan(case)}

    def _capture(self, case: Case, provider: Provider) -> Any:
        layers = self._layers(case, provider)
        calls = [provider.bind(layer, self.x[: case.M], case) for layer in layers]
        return capture(calls, calls_of(len(calls), self.ceilings.floor_us(case, provider.dense)))

    def _preheat(self, case: Case) -> float:
        return PREHEAT_COMPUTE if case.flops / case.nbytes() > 100 else PREHEAT

    def _figures(self, case: Case, provider: Provider, us: float) -> dict[str, Any]:
        floor = self.ceilings.floor_us(case, provider.dense)
        return {
            "us": round(us, 3),
            "gbps": round(case.nbytes(provider.dense) / us / 1e3, 1),
            "tflops": round(case.flops / us / 1e6, 2),
            "floor_us": round(floor, 3),
            "of_floor": round(floor / us, 4),
        }


def changed(rows: Iterable[Row], cases: Iterable[Case]) -> list[Case]:
    """Those that were measured with another plan of ours than they would have now."""
    measured, ours = cells(rows), PROVIDERS["ours"]
    return [case for case in cases if case in measured and measured[case]["ours"]["plan"] != ours.plan(case)]


def planned(ledger: Ledger, cases: Iterable[Case], text: str) -> list[Case]:
    """Those that another commit measured with a plan of ours that reads so: its kernel has changed."""
    measured = cells(row for row in ledger.rows if not ledger.of_this_commit(row))
    return [case for case in cases if case in measured and text in measured[case]["ours"]["plan"]]


def main() -> None:
    options = _options()
    started = time.perf_counter()
    providers = [PROVIDERS[name] for name in options.providers or PEERS[options.suite]]
    cases = only(SUITES[options.suite](), options.only)

    from ceilings import measure  # needs a GPU's Triton

    ceilings = measure()
    print(f"read {ceilings.read_gbps:.0f} GB/s, cuBLAS {ceilings.tflops} TFLOP/s", flush=True)
    run = provenance(METHOD) | {"suite": options.suite, "ceilings": asdict(ceilings)}
    ledger = Ledger(options.out or folder() / f"{options.suite}.json", run, retry=options.retry, renew=options.renew)

    stale = changed(ledger.rows, cases) if options.changed else []
    stale += planned(ledger, cases, options.plan) if options.plan else []
    ledger.again({"provider": provider.name, **asdict(case)} for case in stale for provider in providers)

    def missing(case: Case) -> list[Provider]:
        return [p for p in providers if not ledger.has({"provider": p.name, **asdict(case)})]

    todo = [case for case in cases if missing(case)]
    _prepare(providers, todo)
    for _, group in groupby(todo, key=lambda case: case.weight):
        group = list(group)
        if time.perf_counter() - started > options.seconds:
            break
        bench = Bench(group, ceilings)
        for case in group:
            if time.perf_counter() - started > options.seconds:
                break
            rows = bench.measure(case, missing(case))
            ledger.add(rows)
            _show(case, rows)
            if _lost():
                raise SystemExit("the GPU's context is lost: start again, and the run goes on after this case")
        del bench
        gc.collect()
        torch.cuda.empty_cache()
    left = sum(bool(missing(case)) for case in cases)
    print(summary(ledger.rows))
    print(f"{left} of {len(cases)} cases left, {time.perf_counter() - started:.0f} s, {ledger.path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=sorted(SUITES))
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="KEY=A,B", help="model, shape, m, bits, group, dtype, act_order"
    )
    parser.add_argument("--providers", nargs="*", choices=sorted(PROVIDERS), help="default: depends on the suite")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many seconds")
    parser.add_argument("--retry", action="store_true", help="measure again what failed")
    parser.add_argument("--renew", action="store_true", help="measure again what another commit measured")
    parser.add_argument("--changed", action="store_true", help="measure again what dispatch has another plan for now")
    parser.add_argument("--plan", metavar="TEXT", help="measure again what another commit did by a plan that reads so")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _prepare(providers: Iterable[Provider], cases: Sequence[Case]) -> None:
    for provider in providers:
        began = time.perf_counter()
        try:
            provider.prepare([case for case in cases if not provider.refusal(case)])
        except Exception as problem:  # recorded case by case later on
            print(f"{provider.name}: {_short(problem)}")
        if time.perf_counter() - began > 1:
            print(f"{provider.name}: compiled for {time.perf_counter() - began:.0f} s", flush=True)


def _lost() -> bool:
    """Whether an illegal access has ended this process's use of the GPU: every later row would be an error."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _show(case: Case, rows: Sequence[dict[str, Any]]) -> None:
    times = ", ".join(f"{row['provider']} {row['us']:.1f}" if "us" in row else f"{row['provider']} -" for row in rows)
    fractions = [f", {row['of_floor']:.2f} of the floor" for row in rows if row["provider"] == "ours" and "us" in row]
    kind = f"g{case.group_size}{' act-order' * case.act_order} {case.dtype}"
    print(f"w{case.bits} {case.N}x{case.K} {kind} M={case.M}: {times}{''.join(fractions)}", flush=True)
    for row in rows:
        if "error" in row:
            print(f"  {row['provider']}: {row['error']}", flush=True)


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".replace("\n", " ")[:300]


if __name__ == "__main__":
    main()
