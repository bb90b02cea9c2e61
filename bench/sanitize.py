"""Every kernel of products under NVIDIA's compute-sanitizer, small ones: ``bench/results/<gpu>/sanitizer.json``.

    python bench/sanitize.py                        # memcheck and racecheck, every width
    python bench/sanitize.py --tools memcheck --bits 4

Exact data, so each plan has one right answer, which is checked too. A width is a process of its own; it runs once
without the tool, which compiles. A racecheck warning is not an error; both are counted. "control" is a kernel of
`warp_specialize` with groups of as many warps, which do nothing but store a number each: what is reported of it is
Triton's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ledger import Ledger
from record import folder, provenance
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gptq_triton.kernels.common import barrier
from gptq_triton.spec import BITS

TOOLS = ("memcheck", "racecheck")
CONTROL = "control"
ROWS = (1, 3, 16, 40, 300)  # of x, and of dy
K, N = 640, 272
SECONDS = 150  # for one width and tool
METHOD = (
    "compute-sanitizer over every kind of plan, where it can with two programs that meet, for "
    f"{', '.join(map(str, ROWS))} rows, forward and gradient, N = {N}, K = {K}, fp16, groups of 128, "
    "exact data; with act-order the plan that is chosen"
)


@gluon.jit
def _store(out_ptr, place: gl.constexpr):
    barrier()
    gl.store(out_ptr + place, place)


@gluon.jit
def control_kernel(out_ptr):
    gl.warp_specialize([(_store, (out_ptr, 0)), (_store, (out_ptr, 1)), (_store, (out_ptr, 2))], [4, 1], [24, 24])


def control() -> int:
    """Run the control kernel.

    Raises:
        ArithmeticError: It does not store what it should.
    """
    out = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    control_kernel[(4,)](out, num_warps=4)  # pyright: ignore[reportIndexIssue, reportCallIssue]
    if out.tolist() != [0, 1, 2]:
        raise ArithmeticError(f"the control kernel must store [0, 1, 2], got {out.tolist()}")
    return 1


def products(bits: int) -> int:
    """Run every kind of plan, and count them.

    Raises:
        ArithmeticError: A result is not the exact one.
    """
    from gptq_triton import dispatch, launches, ops, product
    from gptq_triton.bounds import oracle
    from gptq_triton.layout import tile_weight
    from gptq_triton.samples import random_weight

    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.strategies import exact_rows

    weight = random_weight(K, N, bits, 128, exact=True)
    tiled = tile_weight(random_weight(K, N, bits, 128, exact=True, device="cuda"))
    operands, count = launches.Operands.of(tiled, None, True), 0
    for M in ROWS:
        x, dy = (exact_rows(M, width, torch.float16) for width in (K, N))
        expected = oracle(x, weight).half()
        # few programs take one tile, or part of one, after another
        problem = replace(product.problem_of(M, torch.float16, 0, tiled), multiprocessors=4)
        plans: dict[Any, Any] = {"floats": dispatch._dequantize(problem)}
        for plan in dispatch.candidates(problem):
            kind = (type(plan), *(getattr(plan, name, None) for name in ("own_digits", "even", "groups", "resident")))
            if kind not in plans or plan.split == 2:
                plans[kind] = plan
        for plan in plans.values():
            y = torch.empty(M, N, dtype=torch.float16, device="cuda")
            launches.prepare_launch(problem, plan, operands, 0)(x.cuda(), K, None, tiled, y)
            if not torch.equal(y.cpu(), expected):
                raise ArithmeticError(f"{plan} of {problem} does not give the exact result")
        expected = oracle(dy, weight, transposed=True).half()
        gradients = {(plan.block_m, plan.resident): plan for plan in dispatch.transposed_plans(problem)}
        for plan in (dispatch._dequantize(problem), *gradients.values()):
            dx = torch.empty(M, K, dtype=torch.float16, device="cuda")
            launches.multiply_transposed(problem, plan, dy.cuda(), tiled, dx)
            if not torch.equal(dx.cpu(), expected):
                raise ArithmeticError(f"{plan} of {problem} does not give the exact gradient")
        count += len(plans) + len(gradients) + 1
    weight = random_weight(K, N, bits, 128, exact=True, act_order=True)
    tiled = tile_weight(random_weight(K, N, bits, 128, exact=True, act_order=True, device="cuda"))
    for M in ROWS:
        x = exact_rows(M, K, torch.float16)
        if not torch.equal(ops.matmul(x.cuda(), tiled).cpu(), oracle(x, weight).half()):
            raise ArithmeticError(f"{M} rows with act-order do not give the exact result")
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--bits", nargs="*", type=int, choices=BITS, default=BITS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--here", metavar="BITS", help=f"run products of this width in this process, or the {CONTROL}")
    options = parser.parse_args()
    if options.here is not None:
        count = control() if options.here == CONTROL else products(int(options.here))
        print(f"{count} products")
        return
    ledger = Ledger(options.out or folder() / "sanitizer.json", provenance(METHOD), renew=True, identity=("tool", "of"))
    what = [*map(str, options.bits), CONTROL]
    started(what, [])  # compiles
    for tool in options.tools:
        for name, output in started(what, [_sanitizer(), "--tool", tool]).items():
            ledger.add([outcome(tool, name, output)])


def started(what: list[str], before: list[str]) -> dict[str, str]:
    """What a process for each width prints, all at once."""
    child = [*before, sys.executable, __file__, "--here"]
    running = {
        name: subprocess.Popen(
            ["timeout", str(SECONDS), *child, name],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for name in what
    }  # fmt: skip
    return {name: process.communicate()[0] for name, process in running.items()}


def outcome(tool: str, name: str, output: str) -> dict[str, Any]:
    """The row of what the tool printed."""
    row: dict[str, Any] = {"tool": tool, "of": name if name == CONTROL else f"{name} bits"}
    products, errors = re.search(r"^(\d+) products", output, re.M), re.search(r"ERROR SUMMARY: (\d+) error", output)
    races = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\)", output)
    found = errors or races
    if products is None or found is None:
        row["error"] = output[-1500:]
    else:
        row["products"] = int(products[1])
        row |= dict(zip(("errors", "warnings"), map(int, found.groups()), strict=False))
        if row["errors"] or row.get("warnings"):
            row["first"] = "\n".join(line for line in output.splitlines() if line.startswith("========="))[:1500]
    print(row, flush=True)
    return row


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise FileNotFoundError("compute-sanitizer must be on the PATH or in /usr/local/cuda/bin")
    return found


if __name__ == "__main__":
    main()
