"""What a product needs of a plan, and the plans: which kernel, with which tiles. Plain values.

`dispatch.py` chooses, `tables.py` keeps what was measured, `launches.py` launches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

DIGIT_BYTES, SUM_BYTES = 1024, 32  # of a step, for a tile of x; sums for each group that is taken in turn
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB of a program; 99 elsewhere


def groups_of_step(group_columns: int) -> int:
    """How many groups of so many columns the 128 columns of a step have, in part or whole."""
    return max(1, 128 // group_columns)


def power_of_two(number: int) -> int:
    """The least that is as large."""
    return 1 << (number - 1).bit_length()


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
        large: The kernel for many rows takes the operands: rows of x and y start at multiples of 16 bytes, and the
            dtype of x holds the scales, or parts of them.
        ordered: Columns of x are put in another order first (act-order): with their digits, or by a launch of its own.
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
    large: bool = True
    ordered: bool = False

    def split_at(self, rows: int) -> tuple[Problem, Problem]:
        """The same for the first rows, and for the others."""
        return replace(self, M=rows), replace(self, M=self.M - rows)

    @property
    def takes_digits(self) -> bool:
        """Whether the kernels over integer digits of x can run it, M aside."""
        return self.capability >= 80 and self.half_scales and self.dtype in (torch.float16, torch.bfloat16)

    @property
    def takes_large(self) -> bool:
        """Whether the kernel for many rows can run it."""
        return self.capability == 90 and self.large and self.takes_digits

    @property
    def subgroups(self) -> int:
        """Scales of a row in a step."""
        return groups_of_step(self.group_columns)

    @property
    def capability(self) -> int:
        """NVIDIA's compute capability times ten; 0 for others."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def shared_memory(self) -> int:
        """Bytes that a program may have."""
        return _SHARED_MEMORY.get(self.capability, 99) * 1024


@dataclass(frozen=True)
class DecodePlan:
    """Tiles of `kernels/decode.py`."""

    tiles: int  # of x
    strips: int
    warps_n: int
    warps_k: int
    depth: int
    chunk: int
    split: int  # programs that share a tile
    persistent: bool = False  # a program takes one tile after another; with split: equal shares, cut anywhere in a tile
    own_digits: bool = False  # programs find the digits of x themselves; chunk is all of a program's rounds
    in_turn: bool = False  # groups of a step have products of their own, not columns: a tile keeps its four rows

    @property
    def warps(self) -> int:
        """Of a program."""
        return self.warps_n * self.warps_k

    @property
    def strips_of_program(self) -> int:
        """Strips that a program owns at a time."""
        return self.strips * self.warps_n

    def turns(self, problem: Problem) -> int:
        """Groups of a step that have products of their own."""
        return problem.subgroups if self.in_turn else 1

    def rows_of_tile(self, problem: Problem) -> int:
        """Rows of x in a tile, whose eight columns are two digits for each row, and each group unless in turn."""
        return 4 * self.turns(problem) // problem.subgroups

    def rows(self, problem: Problem) -> int:
        """Rows of x that a program multiplies."""
        return self.tiles * self.rows_of_tile(problem)

    @property
    def even(self) -> bool:
        """Whether programs have equal shares of all tiles, which begin and end anywhere in a tile."""
        return self.persistent and self.split > 1

    def tiles_of_weight(self, problem: Problem) -> int:
        """Strips that a program owns at a time, all of them."""
        return -(-problem.strips // self.strips_of_program)

    def rounds(self, problem: Problem) -> int:
        """Of a program: what its warps do at once, a step each."""
        rounds = -(-problem.steps // self.warps_k)  # of a tile
        if self.even:
            return -(-self.tiles_of_weight(problem) * rounds // self.programs(problem))
        return -(-rounds // self.split)

    def programs(self, problem: Problem) -> int:
        """Over the strips: one for each tile, or as few as are as fast when each takes one tile after another."""
        tiles = self.tiles_of_weight(problem)
        if not self.persistent:
            return tiles
        most = problem.multiprocessors
        if self.even:
            return min(most, tiles * -(-problem.steps // self.warps_k))
        return -(-tiles // -(-tiles // most))

    def grid(self, problem: Problem) -> tuple[int, int]:
        """Programs over the strips, and over k."""
        return self.programs(problem), 1 if self.even else self.split

    def parts(self, problem: Problem) -> int:
        """Partial sums of tiles that programs leave for one another."""
        return self.programs(problem) if self.even else (self.split - 1) * self.programs(problem)


@dataclass(frozen=True)
class WidePlan:
    """Tiles of `kernels/wide.py`."""

    warps: int
    depth: int
    chunk: int
    split: int
    max_registers: int  # of a thread: fewer leave room for more programs, of the next launch too

    @property
    def strips_of_program(self) -> int:
        """Strips that a program owns: one a warp."""
        return self.warps

    def turns(self, problem: Problem) -> int:
        """Groups of a step that have products of their own."""
        return problem.subgroups

    def rows(self, problem: Problem) -> int:
        """Rows of x that a program multiplies."""
        return 8 if problem.M <= 8 else 16

    def programs(self, problem: Problem) -> int:
        """Over the strips."""
        return -(-problem.strips // self.strips_of_program)

    def grid(self, problem: Problem) -> tuple[int, int]:
        """Programs over the strips, and over k."""
        return self.programs(problem), self.split

    def parts(self, problem: Problem) -> int:
        """Partial sums of tiles that programs leave for one another."""
        return (self.split - 1) * self.programs(problem)


@dataclass(frozen=True)
class MatmulPlan:
    """Tiles of `kernels/matmul.py`."""

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    ptx: bool = True

    @property
    def strips_of_program(self) -> int:
        """Strips that a program owns."""
        return self.block_n // 16

    def tiles(self, problem: Problem) -> int:
        """Of y."""
        return -(-problem.M // self.block_m) * -(-problem.strips // self.strips_of_program)


class Shares(NamedTuple):
    """Which programs have which tiles: some share the first ones evenly, the others are of one program each."""

    programs: int
    sharing: int  # of the programs, the first ones; as many as there are if no tile is shared
    streamed: int  # tiles that these share

    @classmethod
    def of(cls, tiles: int, split: int, most: int) -> Shares:
        """What so many programs at most do about tiles that do not come out even.

        Args:
            tiles: Of the result.
            split: Programs that share one of the tiles left over when all programs have as many whole ones: so many if
                they can run at once, else as many as can, tiles cut anywhere; 1: none do.
            most: Programs.
        """
        left = tiles % most
        if split == 1 or left == 0:
            return cls(min(tiles, most), min(tiles, most), 0)
        if left * split <= most:
            return cls(left * split if tiles < most else most, left * split, left)
        return cls(most, most, left if tiles < most or 2 * left >= most else left + most)

    @staticmethod
    def equal_parts(tiles: int, most: int) -> int:
        """Of a tile left over, so that as many of the programs as can have one."""
        return most // (tiles % most or most)

    @property
    def parts(self) -> int:
        """Of a shared tile, at most."""
        return max(2, -(-self.sharing // self.streamed)) if self.streamed else 0

    @property
    def even(self) -> bool:
        """Whether tiles are cut at the same places, so that programs are at few of them at a time."""
        return self.streamed == 0 or self.sharing % self.streamed == 0

    def rounds(self, tiles: int) -> int:
        """Whole tiles of the program that has the most."""
        return -(-(tiles - self.streamed) // self.programs)

    def touched(self, tiles: int) -> int:
        """Tiles that a program has or shares, at most."""
        return self.rounds(tiles) + (0 if not self.streamed else 1 if self.even else 2)

    def busiest(self, tiles: int, units: int) -> int:
        """Units of the program that has the most, of tiles of so many units."""
        return self.rounds(tiles) * units + -(-self.streamed * units // self.sharing)


@dataclass(frozen=True)
class LargePlan:
    """Tiles of `kernels/large.py`."""

    block_m: int
    groups: int
    stages: int
    split: int  # as `Shares.of` takes it
    resident: int = 1  # programs of a multiprocessor at a time

    @property
    def strips_of_program(self) -> int:
        """Strips of a tile of y."""
        return 4 * self.groups

    def tiles(self, problem: Problem) -> int:
        """Of y."""
        return -(-problem.M // self.block_m) * -(-problem.strips // self.strips_of_program)

    def shares(self, problem: Problem) -> Shares:
        """Who has which tiles."""
        return Shares.of(self.tiles(problem), self.split, self.resident * problem.multiprocessors)


@dataclass(frozen=True)
class DequantizePlan:
    """W as floats in a workspace, slab by slab, then the vendor's product."""

    strips: int  # of a slab


@dataclass(frozen=True)
class TransposedPlan:
    """Tiles of `kernels/transposed.py`."""

    block_m: int
    stages: int  # in shared memory
    unit: int  # products between two waits of a warpgroup for all; programs that share a tile cut it there
    group_m: int  # blocks of rows of dy that go through W together
    shares: Shares  # of tiles of dx
    resident: int = 1  # programs of a multiprocessor at a time

    @staticmethod
    def products(block_m: int, resident: int) -> int:
        """Of a stage, each of 64 rows of W: two where there are the registers."""
        return 2 if resident == 1 and block_m in (64, 128) else 1

    @staticmethod
    def cut(problem: Problem, block_m: int, unit: int) -> tuple[int, int]:
        """Tiles of dx, and the units of each."""
        return -(-problem.M // block_m) * problem.steps, -(-problem.strips // (4 * unit))


FusedPlan = DecodePlan | WidePlan | MatmulPlan | LargePlan
Plan = FusedPlan | DequantizePlan
GradientPlan = TransposedPlan | DequantizePlan
