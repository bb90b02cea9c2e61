"""Which kernel, with which tiles: plain values, no tensors, testable without a GPU.

`choose` estimates. Where a table of measured plans has the case, the table decides instead (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

ROWS_OF_DECODE = 8  # of x: where the tensor cores' narrow tiles are ahead of Hopper's wide ones
ROWS_OF_WIDE = 64


@dataclass(frozen=True)
class Problem:
    """One product x @ W, as far as a plan depends on it.

    Attributes:
        M: Rows of x.
        strips: Strips of 16 rows of W.
        steps: Steps of 128 columns.
        bits: Of a code.
        group_columns: Columns that share a scale.
        dtype: Of x.
        half_scales: Scales have 16 bits.
        arch: "sm_90" and the like, or AMD's "gfx942" and the like.
        multiprocessors: Of the GPU.
    """

    M: int
    strips: int
    steps: int
    bits: int
    group_columns: int
    dtype: torch.dtype
    half_scales: bool
    arch: str
    multiprocessors: int

    @property
    def takes_digits(self) -> bool:
        """Whether the kernels over integer digits of x can run it, M aside."""
        return self.capability >= 80 and self.half_scales and self.dtype in (torch.float16, torch.bfloat16)

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability times ten; 0 for others."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0


@dataclass(frozen=True)
class DecodePlan:
    """Tiles of `kernels/decode.py`."""

    tiles: int  # of four rows of x
    strips: int
    warps_n: int
    warps_k: int
    depth: int
    chunk: int
    split: int

    @property
    def strips_of_program(self) -> int:
        """Strips that a program owns."""
        return self.strips * self.warps_n


@dataclass(frozen=True)
class WidePlan:
    """Tiles of `kernels/wide.py`."""

    block_m: int
    warps: int
    depth: int
    chunk: int
    split: int

    @property
    def strips_of_program(self) -> int:
        """Strips that a program owns: one a warp."""
        return self.warps


@dataclass(frozen=True)
class DequantizePlan:
    """W as floats in a workspace, slab by slab, then the vendor's product."""

    strips: int  # of a slab


Plan = DecodePlan | WidePlan | DequantizePlan

SLAB_BYTES = 256 << 20  # of W as floats at a time


def choose(problem: Problem, *, transposed: bool = False, batch_invariant: bool = False) -> Plan:
    """The plan for ``x @ W``, or for ``dy @ W.T`` if transposed.

    Args:
        problem: What is to be multiplied.
        transposed: Multiply by the transpose.
        batch_invariant: A row of y may not depend on M: the order of its sum depends on the weight's shape alone.

    Raises:
        TypeError: The kernels do not take the dtype.
    """
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be float16, bfloat16 or float32 on a GPU, got {problem.dtype}")
    digits = problem.takes_digits and not transposed
    if digits and batch_invariant:
        fixed = min(_decode(replace(problem, M=ROWS_OF_DECODE)), key=lambda plan: _microseconds(problem, plan))
        return replace(fixed, tiles=1 if problem.M <= 4 else 2)
    if digits and problem.M <= (ROWS_OF_WIDE if problem.capability == 90 else 2 * ROWS_OF_DECODE):
        return min(candidates(problem), key=lambda plan: _microseconds(problem, plan))
    per_strip = 16 * problem.steps * 128 * problem.dtype.itemsize
    return DequantizePlan(max(1, SLAB_BYTES // per_strip))


def candidates(problem: Problem) -> Iterator[DecodePlan | WidePlan]:
    """Every plan worth timing."""
    if problem.M <= 16:
        yield from _decode(problem)
    if problem.M > ROWS_OF_DECODE and problem.capability == 90:
        yield from _wide(problem)


# (strips, warps_n, warps_k, depth, chunk) of the best tiles on an H200, by width of codes; the last one for small layers
_DECODE = {
    1: {
        2: ((2, 2, 8, 4, 4), (2, 4, 4, 2, 4), (1, 2, 8, 4, 4)),
        3: ((2, 2, 8, 2, 4), (2, 4, 4, 2, 4), (1, 2, 8, 4, 4)),
        4: ((2, 2, 8, 2, 4), (2, 4, 4, 2, 4), (1, 2, 8, 4, 4)),
        8: ((1, 4, 4, 2, 4), (2, 2, 8, 2, 4), (1, 2, 8, 2, 4)),
    },
    2: dict.fromkeys((2, 3, 4, 8), ((2, 2, 8, 2, 2), (2, 4, 4, 2, 4), (2, 1, 8, 2, 4))),
    4: dict.fromkeys((2, 3, 4, 8), ((1, 8, 2, 2, 2), (2, 1, 8, 2, 2))),
}
# (warps, depth, chunk)
_WIDE = {
    16: {2: ((8, 4, 8), (16, 4, 8)), 3: ((8, 4, 8), (16, 4, 8)), 4: ((8, 4, 8), (16, 4, 8)), 8: ((16, 2, 4), (8, 2, 4))},
    32: dict.fromkeys((2, 3, 4, 8), ((8, 2, 4), (16, 2, 4), (4, 2, 2))),
    64: dict.fromkeys((2, 3, 4, 8), ((8, 2, 2), (4, 2, 2))),
}
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB of a program; 99 elsewhere


def _decode(problem: Problem) -> Iterator[DecodePlan]:
    tiles = 1 if problem.M <= 4 else 2 if problem.M <= 8 else 4
    subgroups = max(1, 128 // problem.group_columns)
    for strips, warps_n, warps_k, depth, chunk in _DECODE[tiles][problem.bits]:
        step = tiles * (1024 + 256 * subgroups)
        sums = 256 * tiles * strips * warps_n * warps_k
        room = _SHARED_MEMORY.get(problem.capability, 99) * 1024 - sums
        while chunk > 1 and 2 * chunk * warps_k * step > room:
            chunk //= 2
        if 2 * chunk * warps_k * step > room:
            continue
        rounds = -(-problem.steps // warps_k)
        for split in _SPLITS:
            if split <= rounds:
                yield DecodePlan(tiles, strips, warps_n, warps_k, min(depth, chunk), chunk, split)


def _wide(problem: Problem) -> Iterator[WidePlan]:
    block_m = 16 if problem.M <= 16 else 32 if problem.M <= 32 else 64
    for warps, depth, chunk in _WIDE[block_m][problem.bits]:
        for split in _SPLITS:
            if split <= problem.steps:
                yield WidePlan(block_m, warps, depth, chunk, split)


def _microseconds(problem: Problem, plan: DecodePlan | WidePlan) -> float:
    """Estimate: the bytes of the busiest multiprocessor, filling the pipeline, meeting at the end."""
    warps = plan.warps if isinstance(plan, WidePlan) else plan.warps_n * plan.warps_k
    resident = max(1, 16 // warps)
    programs = -(-problem.strips // plan.strips_of_program) * plan.split
    waves = -(-programs // (resident * problem.multiprocessors))
    busiest = waves * resident * problem.multiprocessors / programs
    work = problem.strips * problem.steps * 256 * problem.bits / 4.3e6 * busiest
    if isinstance(plan, WidePlan):
        # arithmetic takes longer than the weight's arrival
        work = max(work, problem.strips * problem.steps * (60 + 10 * plan.block_m) / (4 * problem.multiprocessors * 1.7e3) * busiest)
    return work + 0.4 * waves + (0.0 if plan.split == 1 else 0.8 + 0.1 * plan.split)
