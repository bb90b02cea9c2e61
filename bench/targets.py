"""What was aimed at, what was measured, and where it is worst.

python bench/targets.py [folder of result files]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from cases import SUITES, Case
from reading import Cell, cells, fractions, geomean, read, speedups
from tables import DEFAULT, GPU, kind_of

Values = Mapping[str, float]
LARGE = 64e6  # bytes of packed codes


@dataclass(frozen=True)
class Results:
    """The result files of one GPU."""

    folder: Path

    @cached_property
    def decode(self) -> dict[Case, Cell]:
        return self._cells("decode")

    @cached_property
    def prefill(self) -> dict[Case, Cell]:
        return self._cells("prefill")

    @cached_property
    def backward(self) -> dict[Case, Cell]:
        return self._cells("backward")

    @cached_property
    def variants(self) -> dict[Case, Cell]:
        return self._cells("variants")

    @cached_property
    def host(self) -> list[dict[str, Any]]:
        return read(self.folder / "host.json")["rows"]

    @cached_property
    def e2e(self) -> list[dict[str, Any]]:
        return read(self.folder / "e2e.json")["rows"]

    @cached_property
    def generate(self) -> list[dict[str, Any]]:
        return read(self.folder / "generate.json")["rows"]

    @cached_property
    def quantize(self) -> list[dict[str, Any]]:
        return read(self.folder / "quantize.json")["rows"]

    @cached_property
    def switches(self) -> list[dict[str, Any]]:
        folders = self.folder, self.folder.parent / "cpu"  # quality does not depend on the machine
        return [row for folder in folders for row in read(folder / "switches.json")["rows"]]

    @cached_property
    def parallel(self) -> list[dict[str, Any]]:
        return read(self.folder / "parallel.json")["rows"]

    def _cells(self, name: str) -> dict[Case, Cell]:
        return cells(read(self.folder / f"{name}.json")["rows"])


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        text: What is bounded.
        bound: The bound.
        values: Every measured value, by what it was measured on.
        at_least: Whether values should be at least the bound, or at most.
        mean: Whether the geometric mean is bounded, or every value.
    """

    text: str
    bound: float
    values: Callable[[Results], Values]
    at_least: bool = True
    mean: bool = False

    def measured(self, results: Results) -> float:
        """The value that the bound is held against; NaN if there is none."""
        values = self.values(results).values()
        if self.mean:
            return geomean(values)
        return (min if self.at_least else max)(values, default=math.nan)

    def met(self, results: Results) -> bool:
        """Whether the bound holds; nothing measured is not met."""
        value = self.measured(results)
        return value >= self.bound if self.at_least else value <= self.bound

    def worst(self, results: Results, count: int) -> list[tuple[str, float]]:
        """The cases furthest on the wrong side."""
        values = sorted(self.values(results).items(), key=lambda item: item[1], reverse=not self.at_least)
        return values[:count]


def name(case: Case) -> str:
    """A case in few words."""
    text = f"w{case.bits} {case.N}x{case.K} M={case.M}"
    text += f" g{case.group_size}" if case.group_size != 128 else ""
    text += " act-order" if case.act_order else ""
    return text + (" bf16" if case.dtype == "bfloat16" else "")


def _named(values: Mapping[Case, float], keep: Callable[[Case], bool] = lambda case: True) -> Values:
    return {name(case): value for case, value in values.items() if keep(case)}


def _large(case: Case) -> bool:
    return case.N * case.K * case.bits / 8 >= LARGE


def _against_plain(found: Mapping[Case, Cell], field: str, figure: str, change: Any, rows: range) -> Values:
    """A variant's figure divided by the plain case's."""
    plain = next(f.default for f in Case.__dataclass_fields__.values() if f.name == field)
    return {
        name(case): cell["ours"][figure] / found[base]["ours"][figure]
        for case, cell in found.items()
        if getattr(case, field) == change and case.M in rows and (base := replace(case, **{field: plain})) in found
    }


def _errors(*suites: Mapping[Case, Cell]) -> Values:
    """Our error divided by that of cuBLAS with the dequantized weight."""
    return {
        f"{case.op} {name(case)}": cell["ours"]["rel_err"] / cell["ours"]["cublas_rel_err"]
        for suite in suites
        for case, cell in suite.items()
        if cell["ours"].get("cublas_rel_err")
    }


def _steps(found: Mapping[Case, Cell]) -> Values:
    """How much slower a product is than one with the next larger M of the benchmark."""
    values = {}
    by_weight: dict[Case, list[tuple[int, float]]] = {}
    for case, cell in found.items():
        by_weight.setdefault(case.weight, []).append((case.M, cell["ours"]["us"]))
    for weight, times in by_weight.items():
        times.sort()
        for (M, us), (_, following) in pairwise(times):
            values[name(replace(weight, M=M))] = us / following
    return values


def _host(rows: Iterable[dict[str, Any]], ratio: bool) -> Values:
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        times.setdefault(f"{row['op']} w{row['bits']} {row['N']}x{row['K']}", {})[row["provider"]] = row["us"]
    return {key: each["QuantLinear"] / (each["nn.Linear"] if ratio else 1) for key, each in times.items()}


def _model(rows: Iterable[dict[str, Any]], job: str, figure: str = "vs_fp16") -> Values:
    """The best of the quantized kinds."""
    found = {
        f"{job} {kind_of(row)}": row[figure]
        for row in rows
        if row["job"] == job and row["kind"] != "fp16" and figure in row
    }
    best = max(found, key=lambda key: found[key], default=None)
    return {} if best is None else {best: found[best]}


def _memory(rows: Iterable[dict[str, Any]]) -> Values:
    sizes = {row["kind"]: row["weights_gb"] for row in rows if row["job"] == "lora"}
    return {kind: size / sizes["fp16"] for kind, size in sizes.items() if kind != "fp16" and "fp16" in sizes}


def _targets() -> list[Target]:
    few, many = range(1, 65), range(64, 8193)
    found = [
        Target(
            f"{bits}-bit, M <= 16, layers of 64 MB and more: fraction of the floor",
            bound,
            lambda r, bits=bits: _named(
                fractions(r.decode), lambda case: case.bits == bits and case.M <= 16 and _large(case)
            ),
        )
        for bits, bound in ((4, 0.80), (8, 0.92), (3, 0.70), (2, 0.62))
    ]
    found += [
        Target("M <= 64: times humming's speed, every case", 1.0, lambda r: _named(speedups(r.decode, "humming"))),
        Target("M <= 64: times humming's speed, mean", 1.3, lambda r: _named(speedups(r.decode, "humming")), mean=True),
        Target(
            "4-bit, 4096 x 4096, M = 1: microseconds",
            6.0,
            lambda r: {
                name(case): cell["ours"]["us"]
                for case, cell in r.decode.items()
                if (case.bits, case.N, case.K, case.M) == (4, 4096, 4096, 1)
            },
            at_least=False,
        ),
    ]
    found += [
        Target(
            f"M = {M}: times humming's speed, mean",
            1.25,
            lambda r, M=M: _named(speedups(r.decode, "humming"), lambda case: case.M == M),
            mean=True,
        )
        for M in (32, 64)
    ]
    found += [
        Target(
            "bf16: times the time of fp16",
            1.08,
            lambda r: _against_plain(r.variants, "dtype", "us", "bfloat16", few),
            at_least=False,
        ),
        Target(
            "act-order: times the time of plain",
            1.05,
            lambda r: _against_plain(r.variants, "act_order", "us", True, few),
            at_least=False,
        ),
    ]
    found += [
        Target(
            f"groups of {size}, M <= 64: times the fraction of the floor of groups of 128",
            1 / 1.15,
            lambda r, size=size: _against_plain(r.variants, "group_size", "of_floor", size, few),
        )
        for size in (32, 64, -1)
    ]
    found += [
        Target(
            "QuantLinear(x), M = 1, host: times nn.Linear's time", 1.5, lambda r: _host(r.host, True), at_least=False
        ),
        Target("QuantLinear(x), M = 1, host: microseconds", 15, lambda r: _host(r.host, False), at_least=False),
        Target("model, batch 1: times the tokens/s of fp16", 2.2, lambda r: _model(r.e2e, "decode-1")),
        Target(
            "relative error: times that of cuBLAS with the dequantized weight",
            1.2,
            lambda r: _errors(r.decode, r.prefill, r.backward, r.variants),
            at_least=False,
        ),
    ]
    for M, humming, cublas in ((64, 1.2, 2.0), (128, 1.15, 1.5)):
        found += [
            Target(
                f"prefill M = {M}: times humming's speed, mean",
                humming,
                lambda r, M=M: _named(speedups(r.prefill, "humming"), lambda case: case.M == M),
                mean=True,
            ),
            Target(
                f"prefill M = {M}, 4-bit layers of 64 MB and more: times the speed of cuBLAS",
                cublas,
                lambda r, M=M: _named(
                    speedups(r.prefill, "cublas"), lambda case: case.M == M and case.bits == 4 and _large(case)
                ),
            ),
        ]
    for M in (256, 512, 1024):
        found += [
            Target(
                f"M = {M}: times humming's speed, every case",
                1.0,
                lambda r, M=M: _named(speedups(r.prefill, "humming"), lambda case: case.M == M),
            ),
            Target(
                f"M = {M}: times the speed of cuBLAS, mean",
                1.0,
                lambda r, M=M: _named(speedups(r.prefill, "cublas"), lambda case: case.M == M),
                mean=True,
            ),
        ]
    found += [
        Target(
            "M >= 1024: times the speed of cuBLAS, every case",
            0.97,
            lambda r: _named(speedups(r.prefill, "cublas"), lambda case: case.M >= 1024),
        ),
        Target(
            "gradient, M >= 256: times the speed of cuBLAS, every case",
            0.95,
            lambda r: _named(speedups(r.backward, "cublas"), lambda case: case.M >= 256),
        ),
        Target(
            "groups of 32, M >= 64: times the time of groups of 128",
            1.12,
            lambda r: _against_plain(r.variants, "group_size", "us", 32, many),
            at_least=False,
        ),
        Target(
            "M from 1 to 8192: times the time of the next larger M",
            1.10,
            lambda r: _steps(r.prefill | r.decode),
            at_least=False,
        ),
        Target("model, prefill of 2048 tokens: times the speed of fp16", 0.97, lambda r: _model(r.e2e, "prefill")),
        Target("model, training step of adapters: times the speed of fp16", 1 / 1.1, lambda r: _model(r.e2e, "lora")),
        Target("model: times the weight memory of fp16", 0.40, lambda r: _memory(r.e2e), at_least=False),
        Target(
            "generate with GraphedDecoding: times the speed of the decoding loop",
            1.0,
            lambda r: {
                f"{row['job']} {row['kind']}": row["vs_loop"]
                for row in r.generate
                if row["way"] == "graphed" and "vs_loop" in row
            },
        ),
        Target(
            "two GPUs: a rank's share of the layers' memory",
            0.55,
            lambda r: {f"{row['job']} {row['kind']}": row["share"] for row in r.parallel if "share" in row},
            at_least=False,
        ),
    ]
    found += [
        Target(
            f"solver, N = 4096, K = {K}: times the eager solver's speed",
            wanted,
            lambda r, K=K: _quantize(r.quantize, "solver", "speedup", K),
        )
        for K, wanted in ((4096, 30), (14336, 40))
    ]
    found += [
        Target(
            "solver: share of codes equal to the eager solver's",
            0.999,
            lambda r: _quantize(r.quantize, "solver", "equal_codes"),
        ),
        Target(
            "8B model, disk to disk: seconds", 60, lambda r: _quantize(r.quantize, "model", "seconds"), at_least=False
        ),
        Target(
            "8B model, disk to disk: GB on the GPU",
            24,
            lambda r: _quantize(r.quantize, "model", "peak_gb"),
            at_least=False,
        ),
    ]
    found.append(
        Target("two GPUs: times one's speed of calibration", 1.7, lambda r: _quantize(r.quantize, "ranks", "speedup"))
    )
    for model, order, limits in (
        ("smollm2", "", {4: 0.20, 3: 0.75, 2: 4.5}),
        ("smollm2", "act-order, ", {4: 0.155, 3: 0.62}),
        ("gemma3-270m", "", {4: 0.105, 3: 0.52, 2: 3.0}),
    ):
        found += [
            Target(
                f"{model}, {bits} bits, {order}default switches: KL on held-out text",
                limit,
                lambda r, model=model, order=order, bits=bits: _divergence(r.switches, model, order + DEFAULT, bits),
                at_least=False,
            )
            for bits, limit in limits.items()
        ]
    return found


def _quantize(rows: list[dict[str, Any]], part: str, field: str, K: int | None = None) -> dict[str, float]:
    """A figure of quantize.json, for whole models only that of 32 layers."""
    chosen = [row for row in rows if row["part"] == part and K in (None, row.get("K"))]
    names = ("N", "K", "act_order", "switches", "ranks")
    return {
        " ".join(f"{name}={row[name]}" for name in names if name in row): row[field]
        for row in chosen
        if part != "model" or row["layers"] == 32
    }


def _divergence(rows: list[dict[str, Any]], model: str, switch: str, bits: int) -> dict[str, float]:
    return {
        text: row[text]["kl"]
        for row in rows
        if (row["model"], row["switch"], row["bits"]) == (model, switch, bits)
        for text in ("speeches", "handbook")
    }


TARGETS = _targets()


def report(results: Results, worst: int = 3) -> str:
    """A line for each target; under a missed one its worst cases; how much of each suite there is."""
    lines = []
    for target in TARGETS:
        values = target.values(results)
        if not values:
            lines.append(f"      not measured  {target.text}")
            continue
        sign = ">=" if target.at_least else "<="
        verdict = "met   " if target.met(results) else "MISSED"
        lines.append(
            f"{verdict}  {target.measured(results):7.3f} {sign} {target.bound:.3g}  {target.text} ({len(values)})"
        )
        if not target.met(results):
            lines += [f"{'':18}{value:7.3f}  {what}" for what, value in target.worst(results, worst)]
    for name, suite in SUITES.items():
        measured: dict[Case, Cell] = getattr(results, name)
        wanted = suite()
        lines.append(f"{sum(case in measured for case in wanted)} of {len(wanted)} cases of {name} are measured")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(Results(Path(sys.argv[1]) if len(sys.argv) > 1 else GPU)))
