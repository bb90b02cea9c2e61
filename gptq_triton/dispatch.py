"""Which kernel, with which tiles: plain values, no tensors, testable without a GPU.

`choose` estimates. Where a table of measured plans has the case, the table decides instead (`tables.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from .plans import (
    DecodePlan,
    DequantizePlan,
    FusedPlan,
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
ROWS_OF_TRANSPOSED = 64  # of dy: below, W as floats is faster
SLAB_BYTES = 256 << 20  # of W as floats at a time


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
def choose_transposed(problem: Problem, *, aligned: bool = True) -> TransposedPlan | DequantizePlan:
    """The plan for ``dy @ W.T``.

    Args:
        problem: What is to be multiplied; dy has its rows and its dtype.
        aligned: Rows of dy and of the result start at multiples of 16 bytes.

    Raises:
        TypeError: The kernels do not take the dtype.
    """
    _check_dtype(problem.dtype)
    floats = _dequantize(problem)
    if problem.M < ROWS_OF_TRANSPOSED or problem.capability != 90 or not problem.takes_digits or not aligned:
        return floats
    whole = [floats] if problem.strips <= floats.strips else []  # else sums of slabs have to be added
    return min((*transposed_plans(problem), *whole), key=lambda plan: _transposed_microseconds(problem, plan))


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
# (warps, depth, chunk, registers) by rows of x and width. Fewer registers leave room for the digits' programs of the
# next launch; some kernels take a few more than 128 for groups of 256 columns and more, unless they are held
_SHALLOW = (4, 4, 4, None), (4, 2, 4, None), (8, 4, 8, None)
_DEEP = (8, 8, 8, 128), (4, 8, 8, 128)
_EIGHT = (4, 2, 4, 112), (4, 2, 4, None), (8, 2, 4, None), (16, 2, 4, None), (8, 4, 8, None), (4, 4, 4, None)
_WIDE = {
    8: {
        2: ((4, 4, 4, 112), *_SHALLOW, *_DEEP),
        3: ((4, 4, 4, 120), *_SHALLOW, *_DEEP),
        4: ((4, 4, 4, 120), *_SHALLOW, *_DEEP),
        8: _EIGHT,
    },
    16: {
        2: ((4, 4, 4, 112), *_SHALLOW, *_DEEP),
        3: ((4, 4, 4, 120), (4, 4, 4, None), (4, 2, 4, None), (8, 4, 8, 128), (8, 8, 8, None), (4, 8, 8, None)),
        4: ((4, 4, 4, 120), *_SHALLOW, (8, 8, 8, None), (4, 8, 8, None)),
        8: _EIGHT,
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
_DIGIT_BYTES, _SUM_BYTES = 1024, 32  # of a step, for a tile of x; sums for each group that is taken in turn
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_UNEVEN = 1.04  # how much longer the busiest multiprocessor takes than all do in the mean, for equal shares to pay off
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}  # KiB of a program; 99 elsewhere


def rows_of_decode(group_columns: int) -> int:
    """Rows of x that are multiplied at once where no row may depend on how many there are."""
    return min(ROWS_OF_DECODE, ROWS_OF_DIGITS // groups_of_step(group_columns))


def _decode(problem: Problem) -> Iterator[DecodePlan]:
    in_turn = problem.subgroups > 1 and 4 // problem.subgroups < problem.M  # else one tile has columns for all groups
    turns = problem.subgroups if in_turn else 1
    tiles = next(tiles for tiles in _DECODE if 4 * tiles >= problem.M * problem.subgroups // turns)
    for strips, warps_n, warps_k, depth, chunk in _DECODE[tiles][problem.bits]:
        step = tiles * (_DIGIT_BYTES + turns * _SUM_BYTES)
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
        yield from (plan for plan in own if plan is not None and _own_digits(problem, plan) < 1.7)


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
    fit = chunk * plan.warps_k * (_DIGIT_BYTES + _SUM_BYTES) <= room
    return replace(plan, chunk=chunk, depth=min(plan.depth, chunk), own_digits=True) if fit else None


def with_order(problem: Problem, plan: FusedPlan) -> FusedPlan | None:
    """A plan for the same product without act-order, changed as the order asks; None where others suit it better."""
    if isinstance(plan, DecodePlan) and plan.own_digits and with_own_digits(problem, plan) != plan:
        return replace(plan, depth=min(plan.depth, 4), chunk=4, own_digits=False)
    many = ROWS_OF_DIGITS // problem.subgroups < problem.M
    return plan if many or isinstance(plan, (DecodePlan, WidePlan)) else None


def _room(problem: Problem, partial_sums: int) -> int:
    """Bytes of shared memory for digits, beside partial sums of so many strips for four rows of x at most."""
    return _SHARED_MEMORY.get(problem.capability, 99) * 1024 - 256 * partial_sums


def _own_digits(problem: Problem, plan: DecodePlan) -> float:
    """Microseconds that passes over x by every program take, on an H200."""
    waves = 1 if plan.persistent else math.ceil(plan.programs(problem) * plan.split / problem.multiprocessors)
    if problem.ordered:
        waves *= 1.5
    return 0.2 * (0.5 + 0.5 * problem.subgroups) * problem.M * waves * plan.chunk / (2 * plan.warps_n)


def _wide(problem: Problem) -> Iterable[WidePlan]:
    plans = {}
    for warps, depth, chunk, registers in _WIDE[8 if problem.M <= 8 else 16][problem.bits]:
        for split in _SPLITS:
            # two products take more registers, and so does the bias where no partial sums meet
            held = problem.subgroups == 1 and (split > 1 or depth == 8)
            if split <= problem.steps:
                plans[WidePlan(warps, depth, chunk, split, registers if held else None)] = None
    return plans


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
# microseconds of a program for a step, by rows, groups and programs that a multiprocessor has, on an H200 at work for a
# while
_LARGE_STEP = {
    (16, 2, 1): 0.38,
    (16, 2, 2): 0.62,
    (16, 4, 1): 0.66,
    (32, 2, 1): 0.41,
    (32, 2, 2): 0.74,
    (32, 4, 1): 0.82,
    (64, 2, 1): 0.53,
    (64, 2, 2): 0.95,
    (64, 4, 1): 0.965,
    (128, 2, 1): 0.83,
    (128, 3, 1): 1.16,
    (256, 2, 1): 1.567,
}
_EIGHT_BITS = 0.02  # more for a group's step
# how much longer steps take of programs that are at many k at a time; and where x, of so many bytes, leaves the cache
_APART, _FAR_APART, _SHARED_X = 1.06, 1.16, 16 << 20


def _large(problem: Problem) -> Iterator[LargePlan]:
    for block_m, groups, resident in _LARGE:
        if 16 < block_m >= 2 * problem.M:
            continue  # tiles that are mostly empty
        rows = 64 * groups
        step = 256 * block_m + rows * (16 * problem.bits + 4 * problem.subgroups)
        room = _SHARED_MEMORY[90] * 1024 // resident - 2048
        # y leaves whole if that leaves room for two stages, else half by half
        stages = max(min(8, (room - 2 * rows * block_m) // step), min(2, (room - rows * block_m) // step))
        if stages < 2 + (resident == 2):
            continue
        whole = LargePlan(block_m, groups, stages, 1, resident)
        tiles, programs = whole.tiles(problem), resident * problem.multiprocessors
        if block_m < min(problem.M, 256) / 3 and (block_m < 32 or tiles > programs):
            continue  # tiles that take turns
        most = programs // (tiles % programs or programs)  # equal parts of a tile
        splits = [split for split in sorted({*_SPLITS, most}) if split <= problem.steps]
        plans = [replace(whole, split=split) for split in splits]
        yield from {plan.shares(problem): plan for plan in reversed(plans)}.values()


# rows of dy of a tile, programs that fit a multiprocessor, stages between two waits
_TRANSPOSED = (32, 2, 2), (64, 2, 2), (64, 1, 4), (128, 1, 4), (256, 1, 4), (256, 1, 8)
# microseconds of a program for a stage of 64 rows of W, by rows and programs that a multiprocessor has, on an H200
_TRANSPOSED_STAGE = {(32, 1): 0.31, (32, 2): 0.53, (64, 1): 0.36, (64, 2): 0.65, (128, 1): 0.49, (256, 1): 0.74}
_TRANSPOSED_UNPACK = {2: -0.04, 3: 0.07, 4: 0.0, 8: 0.02}  # what the other widths take longer than four bits


def transposed_plans(problem: Problem) -> Iterator[TransposedPlan]:
    """Plans for ``dy @ W.T``."""
    for block_m, resident, unit in _TRANSPOSED:
        if 32 < block_m >= 2 * problem.M:
            continue  # tiles that are mostly empty
        if unit == 8 and problem.bits == 3:
            continue  # more registers than there are
        stage = 64 * (2 * block_m + 4 * problem.subgroups + 16 * problem.bits)  # bytes
        stages = min(8, (_SHARED_MEMORY[90] * 1024 // resident - 256 * block_m - 2048) // stage)
        tiles, most = -(-problem.M // block_m) * problem.steps, resident * problem.multiprocessors
        units = -(-problem.strips // (4 * unit))
        equal = most // (tiles % most or most)  # parts of a tile
        plans = {Shares.of(tiles, split, most): None for split in (1, 2, 3, 4, equal, equal + 1) if split <= units}
        yield from (TransposedPlan(block_m, stages, unit, 8, shares, resident) for shares in plans)


def _transposed_microseconds(problem: Problem, plan: TransposedPlan | DequantizePlan) -> float:
    """Estimate, on an H200."""
    if isinstance(plan, DequantizePlan):
        return _floats_microseconds(problem, 16 * problem.strips)
    shares = plan.shares
    tiles, units = -(-problem.M // plan.block_m) * problem.steps, -(-problem.strips // (4 * plan.unit))
    stage = _TRANSPOSED_STAGE[plan.block_m, -(-shares.programs // problem.multiprocessors)]
    stage = (stage + _TRANSPOSED_UNPACK[problem.bits]) * _apart(shares, 32 * problem.M * problem.strips)
    stage *= 1.065 if _lasts(problem) else 1.0
    units = shares.busiest(tiles, units)
    others = 0.0036 * plan.block_m * (shares.touched(tiles) - 1) + shares.parts * (0.15 + 0.0076 * plan.block_m)
    return 1.55 + units * (0.03 + plan.unit * stage) + others


def _lasts(problem: Problem) -> bool:
    """Whether clocks sink meanwhile."""
    return problem.M * problem.strips * 16 * problem.steps * 128 > 32e9


def _floats_microseconds(problem: Problem, terms: int) -> float:
    """W as floats, then the vendor's product, of so many terms a sum, which pays off for small layers."""
    weights = problem.strips * 16 * problem.steps * 128
    work = 2 * problem.M * weights
    rate = 660e6 if _lasts(problem) else 800e6 / (1 + 140 / terms)  # short sums have their cost
    return 5.0 + 0.7e-6 * weights + max(1.2e-3 * terms, work / rate)


def microseconds(problem: Problem, plan: Plan) -> float:
    """Estimate, on an H200: terabytes a second, and cycles of a warp for a strip and step as measured at 1.7 GHz."""
    if isinstance(plan, (DecodePlan, WidePlan)):
        return _few_microseconds(problem, plan)
    order = 2.0 + 256e-6 * problem.M * problem.steps if problem.ordered else 0.0  # by a launch before
    if isinstance(plan, LargePlan):
        return order + _large_microseconds(problem, plan)
    if isinstance(plan, DequantizePlan):
        return order + _floats_microseconds(problem, 128 * problem.steps)
    return order + _matmul_microseconds(problem, plan)


def _few_microseconds(problem: Problem, plan: DecodePlan | WidePlan) -> float:
    """The kernels on integers: bytes, one warp's steps after another, and issue slots, none of which hides the others.

    Constants by least squares and by what choosing wrong costs, over 6800 measured times of 144 cases.
    """
    more = problem.subgroups - 1
    over_n, split = plan.grid(problem)
    programs = over_n * split
    of_program, parts = 1.0, split  # tiles one after another, programs that share one
    digits = 0.3 + 16e-6 * problem.M * problem.steps  # by a launch before
    if isinstance(plan, DecodePlan):
        rounds, strips, filling = plan.rounds(problem), plan.strips, 2.4
        latency, cycles = 360 * plan.strips**0.7, 50 + 57 * plan.tiles
        groups = 1 + 30 * plan.tiles * more / cycles if plan.in_turn else 1.3 if more else 1.0
        tiles = plan.tiles_of_weight(problem)
        if plan.even:
            of_program, parts = 1 + tiles / programs, 1 + -(-programs // tiles)
        elif plan.persistent:
            of_program = -(-tiles // programs)
            rounds *= of_program
        if plan.own_digits:
            digits = 0.6 * _own_digits(problem, plan)
    else:
        rounds, strips, filling = -(-problem.steps // split), 1, 2.7
        latency, cycles = 345, {8: 124, 16: 150}[plan.rows(problem)]
        groups = 1 + 0.4 * more
    groups *= {2: 0.9, 3: 1.06}.get(problem.bits, 1.0)
    each = -(-programs // problem.multiprocessors)  # programs of a multiprocessor
    resident = _resident(problem, plan)
    arrival = problem.strips * problem.steps * (256 * problem.bits + 64 * problem.subgroups) / 4.6e6
    latency = groups * latency + 530 / min(plan.depth, rounds)  # cycles of a round: its own, and until its words arrive
    chain = -(-each // resident) * (filling + rounds * latency / 1.7e3)
    arithmetic = each * rounds * plan.warps * strips * groups * cycles / (4 * 1.7e3)
    meeting = 1.6 + 0.02 * parts if parts > 1 else 0.0
    alone = 0.5 if resident == 1 else 0.0  # the next launch finds no room
    together = (arrival**3 + chain**3 + arithmetic**3) ** (1 / 3)
    return together + digits + meeting + alone + 0.6 * (of_program - 1)


def _resident(problem: Problem, plan: DecodePlan | WidePlan) -> int:
    """Programs that a multiprocessor has room for, by the registers that ptxas takes, and shared memory."""
    words = plan.depth * (2 * problem.bits + 2)  # in flight, of a strip
    if isinstance(plan, DecodePlan):
        most = 40 if plan.even else 80 if plan.own_digits and problem.M == 1 else 72
        registers = 224 if plan.tiles > 2 else 168 if plan.strips * words > most else 128
        digits = plan.chunk * plan.warps_k * plan.tiles * (_DIGIT_BYTES + _SUM_BYTES)
        shared = digits * (2 - plan.own_digits) + 256 * plan.tiles * plan.strips * plan.warps
    else:
        sixteen = plan.rows(problem) == 16
        registers = 168 if words > (40 if sixteen else 72) else 128 if words > (20 if sixteen else 40) else 96
        registers = plan.max_registers or registers  # ptxas takes what it may
        shared = 2 * plan.chunk * plan.rows(problem) * 264  # digits, unit and sum of a row
    return max(1, min(2048 // (plan.warps * registers), _room(problem, 0) // (shared + 1024)))


def _matmul_microseconds(problem: Problem, plan: MatmulPlan) -> float:
    cycles = 190 + 5 * plan.block_m + 58 * (problem.subgroups - 1)
    programs = plan.tiles(problem) * plan.split
    slots = {16: 4, 32: 3}.get(plan.block_m, 2) * problem.multiprocessors
    waves = -(-programs // slots)
    at_once = slots if waves == 1 else problem.multiprocessors  # a slot that is free is taken at once
    work = problem.strips * problem.steps * -(-programs // at_once) * at_once / programs
    arrival = work * 256 * problem.bits / 4.3e6
    arithmetic = work * -(-problem.M // plan.block_m) * cycles / (4 * problem.multiprocessors * 1.7e3)
    meeting = 0.0 if plan.split == 1 else 0.8 + 0.1 * plan.split
    return max(arrival, arithmetic) + 4.0 * waves + meeting


def _large_microseconds(problem: Problem, plan: LargePlan) -> float:
    shares, tiles = plan.shares(problem), plan.tiles(problem)
    at_once = -(-shares.programs // problem.multiprocessors)
    arrival = shares.programs * plan.strips_of_program * 256 * problem.bits / 4.3e6
    step = _LARGE_STEP[plan.block_m, plan.groups, at_once] + _EIGHT_BITS * plan.groups * (problem.bits == 8)
    step += 0.28 * arrival / (plan.stages - 1) * plan.block_m / max(plan.block_m, problem.M)  # what sets out ahead
    step *= _apart(shares, 256 * problem.M * problem.steps if plan.stages == 2 else 0)
    step *= 0.87 + 0.13 * min(1, shares.programs / problem.multiprocessors)  # clocks are higher
    if plan.block_m < 256 and problem.M > 512:  # clocks are lower: words are unpacked more often
        step *= 1.05
    start = 1.66 + 0.0052 * plan.block_m - 0.47 * (plan.resident == 2)  # of two, one begins while another ends
    others = 0.004 * plan.block_m * (shares.touched(tiles) - 1) + shares.parts * (0.4 + 0.006 * plan.block_m)
    return start + shares.busiest(tiles, problem.steps) * max(step, arrival) + others


def _apart(shares: Shares, nbytes: int) -> float:
    """How much longer steps take because programs are at many places of x, of so many bytes, at a time."""
    if shares.even:
        return 1.0
    return _APART if nbytes <= _SHARED_X else _FAR_APART
