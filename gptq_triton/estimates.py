"""How long a product takes by a plan, estimated: what decides where no table has it measured.

Microseconds on an H200 at work for a while. Constants fit what was measured there; on other GPUs the order of plans
counts, not the time.
"""

from __future__ import annotations

import math

from .plans import (
    DIGIT_BYTES,
    SUM_BYTES,
    DecodePlan,
    DequantizePlan,
    GradientPlan,
    LargePlan,
    MatmulPlan,
    Plan,
    Problem,
    Shares,
    WidePlan,
)

# of a program for a step, by rows, groups and programs that a multiprocessor has
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
    (128, 2, 1): 0.8,
    (128, 3, 1): 1.17,
    (256, 2, 1): 1.567,
}
_EIGHT_BITS = 0.015  # more for a group's step
# how much longer steps take of programs that are at many k at a time; and where x, of so many bytes, leaves the cache
_APART, _FAR_APART, _SHARED_X = 1.03, 1.16, 16 << 20
# of a program for 64 rows of W, by rows and programs that a multiprocessor has
_TRANSPOSED_STAGE = {(32, 1): 0.31, (32, 2): 0.53, (64, 1): 0.35, (64, 2): 0.65, (128, 1): 0.46, (256, 1): 0.74}
_TRANSPOSED_UNPACK = {2: -0.04, 3: 0.07, 4: 0.0, 8: 0.02}  # what the other widths take longer than four bits


def microseconds(problem: Problem, plan: Plan) -> float:
    """Of ``x @ W``."""
    if isinstance(plan, (DecodePlan, WidePlan)):
        return _few_microseconds(problem, plan)
    order = 2.0 + 256e-6 * problem.M * problem.steps if problem.ordered else 0.0  # by a launch before
    if isinstance(plan, LargePlan):
        return order + _large_microseconds(problem, plan)
    if isinstance(plan, DequantizePlan):
        return order + _floats_microseconds(problem, 128 * problem.steps)
    return order + _matmul_microseconds(problem, plan)


def transposed_microseconds(problem: Problem, plan: GradientPlan) -> float:
    """Of ``dy @ W.T``."""
    if isinstance(plan, DequantizePlan):
        return _floats_microseconds(problem, 16 * problem.strips)
    shares = plan.shares
    tiles, units = plan.cut(problem, plan.block_m, plan.unit)
    stage = _TRANSPOSED_STAGE[plan.block_m, -(-shares.programs // problem.multiprocessors)]
    stage = (stage + _TRANSPOSED_UNPACK[problem.bits]) * _apart(shares, 32 * problem.M * problem.strips)
    stage *= 1.065 if _lasts(problem) else 1.0
    units = shares.busiest(tiles, units)
    others = 0.0036 * plan.block_m * (shares.touched(tiles) - 1) + shares.parts * (0.15 + 0.0076 * plan.block_m)
    return 1.55 + units * (0.03 + plan.unit * stage) + others


def own_digits_microseconds(problem: Problem, plan: DecodePlan) -> float:
    """Of passes over x by every program."""
    waves = 1 if plan.persistent else math.ceil(plan.programs(problem) * plan.split / problem.multiprocessors)
    if problem.ordered:
        waves *= 1.5
    return 0.2 * (0.5 + 0.5 * problem.subgroups) * problem.M * waves * plan.chunk / (2 * plan.warps_n)


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
            digits = 0.6 * own_digits_microseconds(problem, plan)
    else:
        rounds, strips, filling = -(-problem.steps // split), 1, 2.7
        latency, cycles = 345, {8: 114, 16: 140}[plan.rows(problem)]
        groups = 1 + 0.4 * more
        digits += more * plan.rows(problem) / 16  # sums of every group
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
    """Programs that a multiprocessor has room for, by their registers and shared memory."""
    if isinstance(plan, DecodePlan):
        words = plan.depth * (2 * problem.bits + 2)  # in flight, of a strip
        most = 40 if plan.even else 80 if plan.own_digits and problem.M == 1 else 72
        registers = 224 if plan.tiles > 2 else 168 if plan.strips * words > most else 128
        digits = plan.chunk * plan.warps_k * plan.tiles * (DIGIT_BYTES + SUM_BYTES)
        shared = digits * (2 - plan.own_digits) + 256 * plan.tiles * plan.strips * plan.warps
    else:
        registers = plan.max_registers
        shared = 2 * plan.chunk * plan.rows(problem) * 264  # digits, unit and sum of a row
    return max(1, min(2048 // (plan.warps * registers), problem.shared_memory // (shared + 1024)))


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
    crowd = max(1, problem.bits // 4)  # words beside x in the cache
    step *= _apart(shares, crowd * 256 * problem.M * problem.steps if plan.stages == 2 else 0)
    step *= 0.8 + 0.2 * min(1, shares.programs / problem.multiprocessors)  # clocks are higher
    if plan.block_m < 256 and problem.M > 512:  # clocks are lower: words are unpacked more often
        step *= 1.02
    start = 1.66 + 0.0052 * plan.block_m - 0.47 * (plan.resident == 2)  # of two, one begins while another ends
    others = 0.004 * plan.block_m * (shares.touched(tiles) - 1) + shares.parts * (0.45 + 0.006 * plan.block_m)
    if not shares.even and plan.block_m < problem.M:
        arrival *= 1.25  # some words come more than once
    stage = 256 * (plan.block_m + plan.strips_of_program * problem.bits)  # bytes, from the cache
    return start + shares.busiest(tiles, problem.steps) * max(step, arrival, shares.programs * stage / 7.4e6) + others


def _apart(shares: Shares, nbytes: int) -> float:
    """How much longer steps take because programs are at many places of x, of so many bytes, at a time."""
    if shares.even:
        return 1.0
    return _APART if nbytes <= _SHARED_X else _FAR_APART


def _floats_microseconds(problem: Problem, terms: int) -> float:
    """W as floats, then the vendor's product, of so many terms a sum, which pays off for small layers."""
    weights = problem.strips * 16 * problem.steps * 128
    work = 2 * problem.M * weights
    rate = 660e6 if _lasts(problem) else 800e6 / (1 + 140 / terms)  # short sums have their cost
    return 5.0 + 0.7e-6 * weights + max(1.2e-3 * terms, work / rate, 2 * weights / 4.3e6)


def _lasts(problem: Problem) -> bool:
    """Whether clocks sink meanwhile."""
    return problem.M * problem.strips * 16 * problem.steps * 128 > 32e9
