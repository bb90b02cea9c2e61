"""Make the table of measured plans that the package ships for this GPU: ``gptq_triton/tuned/<gpu>.json``.

    python bench/tune.py [--seconds 500] [--bits 4 8 3 2] [--groups 128] [--rows 1 4 ...] [--only 4096x4096 ...]
        [--act-order] [--out FILE]

Every candidate is compiled first, in as many processes as there are cores; then each layer of shapes.py is tuned at
every width and group size. The file is written after each layer, so a run that is cut off loses nothing; entries it
does not reach stay.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from ahead import Job, compile_plans
from shapes import shapes, siblings

from gptq_triton import dispatch, product, tables
from gptq_triton.atomic import atomic_write
from gptq_triton.layout import TiledWeight
from gptq_triton.plans import Problem
from gptq_triton.spec import BITS, QuantSpec
from gptq_triton.tuning import tune

TUNED = Path(__file__).parent.parent / "gptq_triton" / "tuned"


def random_tiles(N: int, K: int, bits: int, group: int = 128, act_order: bool = False) -> TiledWeight:
    """A weight of random words on the GPU; with act-order its columns are in a random order."""
    strips, steps = -(-N // 16), -(-K // 128)
    words = torch.randint(-(2**31), 2**31 - 1, (strips, steps, 64 * bits), dtype=torch.int32, device="cuda")
    scales = (torch.rand(steps * 128 // group, strips * 16, device="cuda") * 0.01).half().view(torch.int16).int() << 16
    zeros = torch.randint(0, 2**bits, scales.shape, dtype=torch.int32, device="cuda")
    spec = QuantSpec(bits, group)
    order = None
    if act_order:
        order = torch.full((steps * 128,), -1, dtype=torch.int32, device="cuda")
        order[:K] = torch.randperm(K, device="cuda")
    return TiledWeight(words, scales | zeros, None, order, group, spec, K, N, torch.float16)


def jobs(
    cases: list[tuple[int, int, int, int, bool]], arch: str, multiprocessors: int, rows: Sequence[int] = tables.BUCKETS
) -> Iterator[Job]:
    """Every plan that will be timed."""
    for N, K, bits, group, act_order in cases:
        for M in rows:
            problem = Problem(
                M, -(-N // 16), -(-K // 128), bits, group, torch.float16, True, arch, multiprocessors, ordered=act_order
            )
            yield from ((problem, plan) for plan in dispatch.candidates(problem))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--bits", type=int, nargs="+", default=BITS)
    parser.add_argument(
        "--groups", type=int, nargs="+", choices=(32, 64, 128), default=[128], help="columns of a group"
    )
    parser.add_argument("--rows", type=int, nargs="+", choices=tables.BUCKETS, default=tables.BUCKETS, help="of x")
    parser.add_argument("--only", nargs="+", metavar="NxK")
    parser.add_argument("--act-order", action="store_true", help="columns of x are put in another order first")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    known = {**shapes(), **shapes(siblings)}
    wanted = [shape for shape in known if options.only is None or str(shape) in options.only]
    cases = [
        (N, K, bits, group, options.act_order) for group in options.groups for bits in options.bits for N, K in wanted
    ]
    compiled = compile_plans(jobs(cases, *product.gpu(0), options.rows))
    print(f"compiled {compiled} kernels in {time.monotonic() - start:.0f} s", flush=True)
    file = options.out or TUNED / f"{product.gpu_name(0)}.json"
    plans = json.loads(file.read_text()) if file.exists() else tables.shipped(product.gpu_name(0))
    for case in cases:
        if time.monotonic() - start > options.seconds:
            print("out of time")
            break
        best = tune([random_tiles(*case)], options.rows, save=False, say=print)
        plans |= {name: asdict(plan) for name, plan in best.items()}
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(plan)}" for name, plan in plans.items())
        atomic_write(file, f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
