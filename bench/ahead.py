"""Compile plans in as many processes as there are cores, so that a run does not wait for one after another."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from gptq_triton import launches
from gptq_triton.plans import DecodePlan, DequantizePlan, MatmulPlan, Plan, Problem, WidePlan

Job = tuple[Problem, Plan]


def compile_plan(job: Job) -> None:
    """Leave a plan's kernel in Triton's cache on disk."""
    torch.set_num_threads(1)
    problem, plan = job
    half = torch.bfloat16 if problem.dtype == torch.bfloat16 else torch.float16
    operands = launches.Operands(problem.steps * 128, problem.strips * 16, None, half, True)
    launches.prepare_launch(problem, plan, operands, 0)


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """One for each kernel: jobs that differ by more than how many programs share a tile.

    Kernels of plain Triton are left out: they compile when they are first launched, and fast.
    """
    found: dict[object, Job] = {}
    for problem, plan in jobs:
        if not isinstance(plan, (MatmulPlan, DequantizePlan)):
            own = isinstance(plan, DecodePlan) and plan.own_digits
            rows = plan.rows(problem) if isinstance(plan, WidePlan) else problem.M if own else None
            kind = (problem.bits, problem.dtype, problem.group_columns, rows)
            found.setdefault((kind, replace(plan, split=min(plan.split, 2))), (problem, plan))
    return list(found.values())


def compile_plans(jobs: Iterable[Job]) -> int:
    """Compile what the jobs need; how many kernels that was."""
    found = distinct(jobs)
    if found:
        spawn = multiprocessing.get_context("spawn")  # a process that has used the GPU must not fork
        with spawn.Pool(min(os.cpu_count() or 1, 16, len(found))) as pool:
            pool.map(compile_plan, found, chunksize=1)
    return len(found)
