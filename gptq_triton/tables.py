"""Measured plans: the tables that the package ships, and what `tune` found on this machine.

A table is JSON, a plan for each case. The user's tables lie in ``$GPTQ_TRITON_CACHE`` or ``~/.cache/gptq_triton``, one
for each GPU, Triton version and state of the kernels, so that none outlives what it was measured with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

from .atomic import atomic_write
from .dispatch import has_room, with_order
from .plans import DecodePlan, FusedPlan, LargePlan, MatmulPlan, Problem, WidePlan

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024)  # rows of x that share a plan, up to


def case(problem: Problem) -> str:
    """What a measured plan depends on, as tables name it."""
    rows = next(rows for rows in BUCKETS if rows >= problem.M)
    group = f" g{problem.group_columns}" if problem.group_columns < 128 else ""
    order = " act-order" if problem.ordered else ""
    return f"{problem.strips * 16}x{problem.steps * 128} w{problem.bits}{group}{order} m{rows}"


def lookup(gpu: str, problem: Problem) -> FusedPlan | None:
    """The measured plan for a case on a GPU, or None: the user's own before the shipped one.

    A weight with act-order that was not measured has the plan of one without, where the order costs it little.
    """
    if BUCKETS[-1] < problem.M or not problem.takes_digits:
        return None
    found = _table(gpu).get(case(problem))
    plan = None if found is None else plan_from(found)
    if plan is None and problem.ordered and (plan := lookup(gpu, replace(problem, ordered=False))) is not None:
        plan = with_order(problem, plan)
    if isinstance(plan, DecodePlan) and not has_room(problem, plan):
        return None  # on a GPU of that name with fewer multiprocessors a program has more to find than it has room for
    return None if isinstance(plan, LargePlan) and not problem.takes_large else plan


def plan_from(found: dict[str, int]) -> FusedPlan:
    """A plan as tables hold it."""
    kinds = {"tiles": DecodePlan, "groups": LargePlan, "block_n": MatmulPlan, "warps": WidePlan}
    kind = next(kind for name, kind in kinds.items() if name in found)
    return kind(**cast(dict[str, Any], found))


def save(gpu: str, plans: Mapping[str, FusedPlan]) -> Path:
    """Add plans to the user's table, whole or not at all."""
    file = user_file(gpu)
    file.parent.mkdir(parents=True, exist_ok=True)
    merged = _read(file) | {name: asdict(plan) for name, plan in plans.items()}
    atomic_write(file, json.dumps(merged, indent=1) + "\n")
    _table.cache_clear()
    return file


def user_file(gpu: str) -> Path:
    """Where the user's table for a GPU lies, with this Triton and these kernels."""
    import triton

    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptq_triton"
    folder = Path(os.environ.get("GPTQ_TRITON_CACHE") or default)
    return folder / f"{gpu}-triton{triton.__version__}-{_kernels()}.json"


@functools.cache
def _kernels() -> str:
    """A hash of the kernels' source."""
    digest = hashlib.sha256()
    for file in sorted((resources.files("gptq_triton") / "kernels").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def _table(gpu: str) -> dict[str, dict[str, int]]:
    return shipped(gpu) | _read(user_file(gpu))


def shipped(gpu: str) -> dict[str, dict[str, int]]:
    """The table that the package ships for a GPU; empty if there is none."""
    file = resources.files("gptq_triton") / "tuned" / f"{gpu}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _read(file: Path) -> dict[str, dict[str, int]]:
    return json.loads(file.read_text()) if file.is_file() else {}
