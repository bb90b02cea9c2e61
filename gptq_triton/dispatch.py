"""Which kernel, with which tiles: plain values, no tensors, testable without a GPU.

`choose` takes what is estimated to be fastest (`estimates.py`). Where a table of measured plans has the case, the table
decides instead (`tables.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from .estimates import microseconds, own_digits_microseconds, transposed_microseconds
from .plans import (
    DIGIT_BYTES,
    SUM_BYTES,
    DecodePlan,
    DequantizePlan,
    FusedPlan,
    GradientPlan,
    LargePlan,
    MatmulPlan,
    Plan,
    Problem,
    Shares,
    TransposedPlan,
    WidePlan,
    groups_of_step,
    power_of_two,
)

ROWS_OF_DECODE = 8  # of x: beyond, what the decode kernel does for each row outweighs the weight's arrival
ROWS_OF_DIGITS = 16  # up to which x may be multiplied as digits; fewer where a step has several groups
# beyond, without the kernel for many rows, W as floats pays off: on an H200 between 128 (4096 x 4096) and 400 rows
ROWS_OF_MATMUL = 192
ROWS_OF_FLOATS = 256  # up to which W as floats never pays off where there is the kernel for many rows
SLAB_BYTES = 256 << 20  # of W as floats at a time
# how much longer one launch has to be estimated to take for two to pay off; and the microseconds that a second one on
# tiles loses, whose programs find no room before those of the first have ended
_TWO_LAUNCHES, _BEHIND = 1.03, 4.0


@functools.lru_cache(1024)
def rows_at_once(problem: Problem) -> int:
    """Rows of x to multiply by a first launch: all, or as many as fill tiles, so that a few are left over."""
    if not problem.takes_large:
        return problem.M
    return _filling(problem, lambda part: microseconds(part, choose(part)), ROWS_OF_DIGITS)


@functools.lru_cache(1024)
def rows_at_once_transposed(problem: Problem, *, aligned: bool = True) -> int:
    """The same of dy."""
    return _filling(problem, lambda part: transposed_microseconds(part, choose_transposed(part, aligned=aligned)), 0)


def _filling(problem: Problem, time: Callable[[Problem], float], few: int) -> int:
    """The same by an estimate for so many rows; up to few rows have smaller programs."""
    times = {problem.M: time(problem)}
    for rows in {problem.M // tile * tile for tile in (64, 128, 256)} - {0, problem.M}:
        behind = _BEHIND if problem.M - rows > few else 0.0
        times[rows] = _TWO_LAUNCHES * sum(map(time, problem.split_at(rows))) + behind
    return min(times, key=lambda rows: times[rows])


def choose(problem: Problem, *, batch_invariant: bool = False) -> Plan:
    """The plan for ``x @ W``.

    Args:
        problem: What is to be multiplied.
        batch_invariant: A row of y may not depend on M: the order of its sum depends on the weight's shape alone.

    Raises:
        TypeError: The kernels do not take the dtype.
    """
    _check_dtype(problem.dtype)
    if problem.M > ROWS_OF_MATMUL and not problem.takes_large and not batch_invariant:
        return _dequantize(problem)
    if batch_invariant:
        # the plan for most rows, whose tiles of x may be fewer
        most = replace(problem, M=rows_of_decode(problem.group_columns))
        plans = _decode(most) if most.takes_digits else _matmul(most)
        plan = min(plans, key=lambda plan: microseconds(most, plan))
        fits = isinstance(plan, DecodePlan) and plan.rows_of_tile(problem) >= problem.M
        return replace(plan, tiles=1) if fits else plan
    choice: list[Plan] = [*candidates(problem)]
    if problem.M > ROWS_OF_FLOATS:
        choice.append(_dequantize(problem))
    return min(choice, key=lambda plan: microseconds(problem, plan))


@functools.lru_cache(1024)
def choose_transposed(problem: Problem, *, aligned: bool = True) -> GradientPlan:
    """The plan for ``dy @ W.T``.

    Args:
        problem: What is to be multiplied; dy has its rows and its dtype.
        aligned: Rows of dy and of the result start at multiples of 16 bytes.

    Raises:
        TypeError: The kernels do not take the dtype.
    """
    _check_dtype(problem.dtype)
    floats = _dequantize(problem)
    if problem.capability != 90 or not problem.takes_digits or not aligned:
        return floats
    whole = [floats] if problem.strips <= floats.strips else []  # else sums of slabs have to be added
    return min((*transposed_plans(problem), *whole), key=lambda plan: transposed_microseconds(problem, plan))


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype must be float16, bfloat16 or float32 on a GPU, got {dtype}")


def _dequantize(problem: Problem) -> DequantizePlan:
    per_strip = 16 * problem.steps * 128 * problem.dtype.itemsize
    return DequantizePlan(max(1, SLAB_BYTES // per_strip))


def candidates(problem: Problem) -> Iterator[FusedPlan]:
    """Every plan worth timing."""
    rows = problem.M
    most = ROWS_OF_DIGITS // problem.subgroups  # digits take more products for more groups, floats only more scales
    few = most // 2
    if problem.takes_digits:
        if rows <= most:
            yield from _decode(problem)
        if problem.capability == 90 and problem.subgroups <= 2 and ROWS_OF_DECODE // 2 < rows <= ROWS_OF_DIGITS:
            yield from _wide(problem)
    if problem.takes_large and rows > few:
        yield from _large(problem)
    # up to so many rows the others are never slower
    fewest = ROWS_OF_DIGITS if problem.takes_large else few if problem.takes_digits else 0
    if fewest < rows <= ROWS_OF_MATMUL:
        yield from _matmul(problem)


# (strips, warps_n, warps_k, depth, chunk) by width of codes. Programs of four and eight warps leave room for the next
# launch, whose words are then on their way while this one ends
_FULL = (1, 4, 4, 4, 4), (2, 4, 4, 2, 4), (2, 2, 8, 2, 4), (1, 2, 8, 4, 4)
_HALF = (1, 2, 4, 8, 8), (1, 1, 8, 8, 8), (1, 1, 4, 8, 8), (1, 2, 2, 8, 8)
_PAIRS = (1, 4, 4, 4, 4), (2, 2, 8, 2, 2), (1, 2, 8, 2, 2)
_DECODE = {
    1: {
        2: (*_FULL, *_HALF, (2, 2, 8, 4, 4), (2, 4, 4, 4, 4), (1, 4, 4, 8, 8), (2, 2, 4, 4, 4)),
        3: (*_FULL, *_HALF, (2, 4, 4, 4, 4), (1, 4, 4, 8, 8)),
        4: (*_FULL, *_HALF, (1, 2, 8, 2, 4), (1, 4, 4, 8, 8)),
        8: (
            (1, 4, 4, 2, 4),
            (1, 2, 8, 2, 4),
            (1, 2, 8, 4, 4),
            (1, 2, 4, 4, 4),
            (1, 1, 8, 4, 4),
            (1, 1, 4, 4, 4),
            (1, 2, 2, 4, 4),
        ),
    },
    2: {
        **dict.fromkeys((2, 3), (*_PAIRS, (1, 2, 8, 4, 4), (1, 2, 4, 4, 4), (1, 1, 8, 4, 4))),
        4: (*_PAIRS, (1, 2, 4, 4, 4), (1, 1, 8, 4, 4)),
        8: ((1, 4, 4, 2, 4), (1, 2, 8, 2, 2), (1, 2, 4, 2, 4), (1, 1, 8, 2, 2)),
    },
    4: dict.fromkeys((2, 3, 4, 8), ((2, 1, 8, 2, 2),)),
}
# (warps, depth, chunk, registers of a thread at most) by rows of x and groups of a step, then width. Fewer registers
# leave room for more programs of this launch, and for those that find the digits of the next
_DEEP = (8, 8, 8, 128), (4, 8, 8, 128)
_DEEPER = (8, 8, 8, 255), (4, 8, 8, 168)
_WIDE = {
    (8, 1): {
        2: ((4, 4, 4, 112), (4, 4, 4, 80), (4, 2, 4, 64), (8, 4, 8, 80), *_DEEP),
        3: ((4, 4, 4, 120), (4, 4, 4, 96), (4, 2, 4, 64), (8, 4, 8, 128), *_DEEP),
        4: ((4, 4, 4, 120), (4, 4, 4, 96), (4, 2, 4, 72), (8, 4, 8, 128), *_DEEP),
        8: ((4, 2, 4, 112), (4, 2, 4, 96), (8, 2, 4, 96), (16, 2, 4, 128), (8, 4, 8, 128), (4, 4, 4, 128)),
    },
    (16, 1): {
        2: ((4, 4, 4, 112), (4, 4, 4, 128), (4, 2, 4, 96), (8, 4, 8, 128), *_DEEP),
        3: ((4, 4, 4, 120), (4, 4, 4, 128), (4, 4, 4, 136), (4, 2, 4, 96), (8, 4, 8, 128), *_DEEPER),
        4: ((4, 4, 4, 120), (4, 4, 4, 128), (4, 2, 4, 96), (8, 4, 8, 128), *_DEEPER),
        8: ((4, 2, 4, 112), (4, 2, 4, 128), (8, 2, 4, 128), (16, 2, 4, 128), (8, 4, 8, 255), (4, 4, 4, 168)),
    },
    (8, 2): {
        **dict.fromkeys((2, 3, 4), ((4, 4, 4, 128), (4, 2, 4, 96), (8, 4, 8, 128), *_DEEPER)),
        8: ((4, 2, 4, 128), (8, 2, 4, 128), (16, 2, 4, 128), (8, 4, 8, 255), (4, 4, 4, 168)),
    },
    (16, 2): {
        **dict.fromkeys((2, 3, 4), ((4, 4, 4, 168), (4, 2, 4, 128), (8, 2, 4, 128), (8, 4, 8, 255))),
        8: ((4, 2, 4, 168), (8, 2, 4, 255), (8, 4, 8, 255), (4, 4, 4, 255)),
    },
}
# (block_n, warps, stages, registers) by rows of x: Hopper's are measured; elsewhere what compiles without spilling
_HOPPER = {
    16: ((128, 4, 4, 128), (64, 4, 4, None)),
    32: ((128, 4, 4, 168), (64, 4, 4, None)),
    64: ((128, 4, 3, None), (64, 4, 3, None)),
}
_NVIDIA = {16: ((128, 4, 3, None),), 32: ((128, 4, 3, None),)}
_AMD = {16: ((64, 4, 2, None),), 64: ((64, 4, 2, None),)}
_FLOAT = {16: ((32, 8, 2, None),)}
_ORDERED = 1024  # numbers of x that a warp may hold to put them in order: 16 registers of a lane
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_UNEVEN = 1.04  # how much longer the busiest multiprocessor takes than all do in the mean, for equal shares to pay off


def rows_of_decode(group_columns: int) -> int:
    """Rows of x that are multiplied at once where no row may depend on how many there are."""
    return min(ROWS_OF_DECODE, ROWS_OF_DIGITS // groups_of_step(group_columns))


def _decode(problem: Problem) -> Iterator[DecodePlan]:
    in_turn = problem.subgroups > 1 and 4 // problem.subgroups < problem.M  # else one tile has columns for all groups
    turns = problem.subgroups if in_turn else 1
    tiles = next(tiles for tiles in _DECODE if 4 * tiles >= problem.M * problem.subgroups // turns)
    for strips, warps_n, warps_k, depth, chunk in _DECODE[tiles][problem.bits]:
        step = tiles * (DIGIT_BYTES + turns * SUM_BYTES)
        room = _room(problem, tiles * strips * warps_n * warps_k)
        while chunk > 1 and 2 * chunk * warps_k * step > room:
            chunk //= 2
        rounds = -(-problem.steps // warps_k)
        one = DecodePlan(tiles, strips, warps_n, warps_k, min(depth, chunk), chunk, 1, in_turn=in_turn)
        count, slots = one.tiles_of_weight(problem), problem.multiprocessors * max(1, 16 // one.warps)
        splits = [split for split in _SPLITS if split == 1 or split <= min(rounds, slots // count)]
        plans = [replace(one, split=split) for split in splits]
        one_by_one, even = replace(one, persistent=True), replace(one, persistent=True, split=2)
        if one_by_one.programs(problem) < count:
            plans.append(one_by_one)
        waves = count / even.programs(problem)
        if rounds > 1 and even.rounds(problem) > 1 and math.ceil(waves) > _UNEVEN * waves:
            plans.append(even)
        yield from plans
        own = (with_own_digits(problem, replace(plan, depth=depth)) for plan in plans)
        yield from (plan for plan in own if plan is not None and own_digits_microseconds(problem, plan) < 1.7)


def with_own_digits(problem: Problem, plan: DecodePlan) -> DecodePlan | None:
    """The same tiles for programs that find the digits of x themselves; None where these do not fit."""
    if plan.in_turn or plan.rows_of_tile(problem) < problem.M:
        return None
    rounds = min(plan.rounds(problem), math.ceil(problem.steps / plan.warps_k))
    passes = math.ceil(rounds / (2 * plan.warps_n))  # of two steps a warp
    chunk = passes * 2 * plan.warps_n
    room = _room(problem, plan.strips * plan.warps)
    if problem.ordered:  # every program puts all of x in order
        row = power_of_two(128 * problem.steps)
        room -= 2 * row
        if problem.M > 2 or passes > 2 or problem.M * row > _ORDERED * plan.warps:
            return None  # a launch before is faster, or there are not the registers
    fit = chunk * plan.warps_k * (DIGIT_BYTES + SUM_BYTES) <= room
    return replace(plan, chunk=chunk, depth=min(plan.depth, chunk), own_digits=True) if fit else None


def has_room(problem: Problem, plan: DecodePlan) -> bool:
    """Whether programs that find the digits of x themselves, if they do, have room for what there is to find."""
    return not plan.own_digits or with_own_digits(problem, plan) == plan


def _room(problem: Problem, partial_sums: int) -> int:
    """Bytes of shared memory for digits, beside partial sums of so many strips for four rows of x at most."""
    return problem.shared_memory - 256 * partial_sums


def with_order(problem: Problem, plan: FusedPlan) -> FusedPlan | None:
    """A plan for the same product without act-order, changed as the order asks; None where others suit it better."""
    if isinstance(plan, DecodePlan) and not has_room(problem, plan):
        return replace(plan, depth=min(plan.depth, 4), chunk=4, own_digits=False)
    many = ROWS_OF_DIGITS // problem.subgroups < problem.M
    return plan if many or isinstance(plan, (DecodePlan, WidePlan)) else None


def _wide(problem: Problem) -> Iterable[WidePlan]:
    rows = 8 if problem.M <= 8 else 16
    splits = [split for split in _SPLITS if split <= problem.steps]
    found = _WIDE[rows, problem.subgroups][problem.bits]
    return [
        WidePlan(warps, depth, chunk, split, registers) for warps, depth, chunk, registers in found for split in splits
    ]


def _matmul(problem: Problem) -> Iterator[MatmulPlan]:
    ptx = problem.capability >= 80 and problem.dtype != torch.float32
    if problem.dtype == torch.float32:
        table = _FLOAT
    else:
        table = _HOPPER if problem.capability == 90 else _NVIDIA if ptx else _AMD
    block_m = next((rows for rows in table if rows >= problem.M), max(table))
    for block_n, warps, stages, registers in table[block_m]:
        registers = registers if problem.group_columns >= 128 else None  # smaller groups take more
        for split in _SPLITS:
            if split <= problem.steps:
                yield MatmulPlan(block_m, block_n, split, warps, stages, registers, ptx)


# rows of x of a tile, multiplying groups, programs that fit a multiprocessor
_LARGE = (
    *((rows, groups, resident) for rows in (16, 32, 64) for groups, resident in ((2, 2), (4, 1))),
    *((64, 2, 1), (128, 2, 1), (128, 3, 1), (256, 2, 1)),
)


def _large(problem: Problem) -> Iterator[LargePlan]:
    for block_m, groups, resident in _LARGE:
        if 16 < block_m >= 2 * problem.M:
            continue  # tiles that are mostly empty
        rows = 64 * groups
        step = 256 * block_m + rows * (16 * problem.bits + 4 * problem.subgroups)
        room = problem.shared_memory // resident - 2048
        least = 2 + (resident == 2)
        # y leaves whole if that leaves room for the least stages, else half by half
        stages = max(min(8, (room - 2 * rows * block_m) // step), min(least, (room - rows * block_m) // step))
        if stages < least:
            continue
        whole = LargePlan(block_m, groups, stages, 1, resident)
        tiles, programs = whole.tiles(problem), resident * problem.multiprocessors
        if block_m < min(problem.M, 256) / 3 and (block_m < 32 or tiles > programs):
            continue  # tiles that take turns
        splits = sorted({*_SPLITS, Shares.equal_parts(tiles, programs)})
        splits = [split for split in splits if split <= problem.steps]
        plans = [replace(whole, split=split) for split in splits]
        yield from {plan.shares(problem): plan for plan in reversed(plans)}.values()


# rows of dy of a tile, programs that fit a multiprocessor, products between two waits
_TRANSPOSED = (32, 2, 2), (64, 2, 2), (64, 1, 4), (128, 1, 4), (256, 1, 4), (256, 1, 8)


def transposed_plans(problem: Problem) -> Iterator[TransposedPlan]:
    """Plans for ``dy @ W.T``."""
    for block_m, resident, unit in _TRANSPOSED:
        if 32 < block_m >= 2 * problem.M:
            continue  # tiles that are mostly empty
        if unit == 8 and problem.bits == 3:
            continue  # more registers than there are
        products = TransposedPlan.products(block_m, resident)
        stage = 64 * products * (2 * block_m + 4 * problem.subgroups + 16 * problem.bits)  # bytes
        stages = min(8 // products, (problem.shared_memory // resident - 256 * block_m - 2048) // stage)
        tiles, units = TransposedPlan.cut(problem, block_m, unit)
        most = resident * problem.multiprocessors
        equal = Shares.equal_parts(tiles, most)
        plans = {Shares.of(tiles, split, most): None for split in (1, 2, 3, 4, equal, equal + 1) if split <= units}
        yield from (TransposedPlan(block_m, stages, unit, 8, shares, resident) for shares in plans)
