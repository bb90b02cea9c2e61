"""dispatch.choose is a pure function: no GPU, no tensors."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton import tables
from gptq_triton.dispatch import (
    candidates,
    choose,
    choose_transposed,
    rows_at_once,
    rows_at_once_transposed,
    transposed_plans,
)
from gptq_triton.estimates import microseconds, transposed_microseconds
from gptq_triton.layout import ONE_GROUP
from gptq_triton.plans import (
    DecodePlan,
    DequantizePlan,
    LargePlan,
    MatmulPlan,
    Problem,
    Shares,
    TransposedPlan,
    WidePlan,
)
from gptq_triton.spec import BITS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448}  # bytes a program may use; 101376 elsewhere
H200 = Problem(1, 256, 32, 4, 128, torch.float16, True, "sm_90", 132)

problems = st.builds(
    Problem,
    M=st.integers(1, 16) | st.integers(1, 3000),
    strips=st.integers(1, 5000),
    steps=st.integers(1, 400),
    bits=st.sampled_from(BITS),
    group_columns=st.sampled_from((32, 64, 128, 256, 512, ONE_GROUP)),
    dtype=st.sampled_from(DTYPES),
    half_scales=st.booleans(),
    arch=st.sampled_from(ARCHS),
    multiprocessors=st.sampled_from((20, 82, 132, 148)),
    large=st.booleans(),
    ordered=st.booleans(),
)


@given(problems, st.booleans())
def test_every_plan_can_be_launched(problem, batch_invariant):
    chosen = choose(problem, batch_invariant=batch_invariant)
    assert type(chosen)(**json.loads(json.dumps(asdict(chosen)))) == chosen
    for plan in [chosen, *candidates(problem)]:
        if isinstance(plan, DequantizePlan):
            continue
        assert 1 <= plan.split <= problem.steps
        if isinstance(plan, DecodePlan):
            assert problem.takes_digits
            assert batch_invariant or plan.tiles * plan.rows_of_tile(problem) >= problem.M
            assert plan.chunk >= plan.depth
            assert plan.own_digits or plan.chunk % plan.depth == 0
            assert plan.warps_n * plan.warps_k <= 16
            per_step = plan.tiles * (1024 + 32 * plan.turns(problem))
            used = (2 - plan.own_digits) * plan.chunk * plan.warps_k * per_step
            used += 256 * plan.tiles * plan.strips * plan.warps_n * plan.warps_k
            assert used <= SHARED_MEMORY.get(problem.arch, 101376) or plan.chunk == 1
            if plan.own_digits:
                assert plan.tiles == 1
                if problem.ordered:  # registers of a lane
                    assert problem.M * problem.steps * 128 <= 32 * 2 * 16 * plan.warps
                    assert plan.chunk <= 4 * plan.warps_n
                assert plan.chunk >= min(plan.rounds(problem), math.ceil(problem.steps / plan.warps_k))
                assert plan.chunk % (2 * plan.warps_n) == 0  # whole passes of two steps a warp
        elif isinstance(plan, WidePlan):
            assert problem.arch == "sm_90"
            assert problem.M <= 16
            assert plan.chunk % plan.depth == 0
        elif isinstance(plan, LargePlan):
            assert problem.arch == "sm_90"
            assert problem.large
            assert problem.half_scales
            assert problem.dtype != torch.float32
            assert plan.stages >= 2
            rows = 64 * plan.groups
            meta = 4 * max(1, 128 // problem.group_columns)
            used = plan.stages * (256 * plan.block_m + rows * (16 * problem.bits + meta)) + rows * plan.block_m
            assert used + (rows * plan.block_m if plan.stages > 2 else 0) <= SHARED_MEMORY["sm_90"] // plan.resident
            assert plan.shares(problem).programs <= plan.resident * problem.multiprocessors
            check_numbers(plan.shares(problem), plan.tiles(problem), problem.steps)
        else:
            assert batch_invariant or problem.M <= 192
            assert plan.block_n % 32 == 0
            assert not plan.ptx or (problem.capability >= 80 and problem.dtype != torch.float32)


@given(problems, st.integers(1, 9000), st.booleans())
def test_every_transposed_plan_can_be_launched(problem, M, aligned):
    problem = replace(problem, M=M)
    plan = choose_transposed(problem, aligned=aligned)
    if isinstance(plan, DequantizePlan):
        assert plan.strips >= 1
        return
    assert aligned
    assert problem.arch == "sm_90"
    assert problem.takes_digits
    stage = 64 * (2 * plan.block_m + 4 * max(1, 128 // problem.group_columns) + 16 * problem.bits)
    room = SHARED_MEMORY["sm_90"] if plan.resident == 1 else 113 << 10
    assert plan.stages * (stage + 16) + 256 * plan.block_m + 512 <= room
    assert plan.stages >= 3
    tiles, units = -(-M // plan.block_m) * problem.steps, -(-problem.strips // (4 * plan.unit))
    assert plan.shares.programs <= plan.resident * problem.multiprocessors
    check_numbers(plan.shares, tiles, units)


def check_numbers(shares, tiles, units):
    """The kernels can take them."""
    assert 1 <= shares.sharing <= shares.programs <= tiles * units
    assert 0 <= shares.streamed <= tiles
    assert shares.streamed == 0 or shares.streamed * units >= shares.sharing  # a unit or more for each


@given(st.integers(1, 3000), st.integers(1, 150), st.integers(1, 140), st.integers(1, 300))
def test_tiles_left_over_are_shared(tiles, split, most, units):
    shares, left = Shares.of(tiles, split, most), tiles % most
    assert shares.busiest(tiles, units) * shares.programs >= tiles * units
    assert shares.busiest(tiles, units) <= -(-tiles // most) * units  # never worse than alone
    if split == 1:
        assert shares.streamed == 0
    elif left * split <= most:
        assert shares.even
        assert shares.busiest(tiles, units) == tiles // most * units + (-(-units // split) if left else 0)
    else:  # as even as can be
        assert shares.busiest(tiles, units) <= -(-tiles * units // most) + (tiles > most)


@pytest.mark.parametrize("M", [1024, 2048])
def test_rows_that_leave_the_cache_are_read_at_few_places(M):
    problem = replace(H200, strips=320, steps=200, M=M)
    plan = choose(problem)
    assert isinstance(plan, LargePlan)
    assert plan.block_m == 256
    assert plan.shares(problem).even
    assert plan.shares(problem).busiest(plan.tiles(problem), 200) < -(-plan.tiles(problem) // 132) * 200


@pytest.mark.parametrize("M", [256, 1024])
def test_small_layers_take_small_tiles(M):
    plan = choose(replace(H200, strips=36, steps=5, M=M))
    assert isinstance(plan, LargePlan)
    assert plan.block_m <= 64


@given(problems, st.integers(1, 9000), st.booleans())
def test_rows_left_over_have_a_launch_if_that_is_estimated_to_be_faster(problem, M, transposed):
    def time(part):
        if transposed:
            return transposed_microseconds(part, choose_transposed(part))
        return microseconds(part, choose(part))

    problem = replace(problem, M=M)
    rows = (rows_at_once_transposed if transposed else rows_at_once)(problem)
    assert sum(time(replace(problem, M=part)) for part in (rows, M - rows) if part) <= time(problem)
    if rows < M:
        assert problem.arch == "sm_90"
        assert rows % 64 == 0


@pytest.mark.parametrize(("M", "rows"), [(1, 1), (64, 64), (129, 128), (192, 128), (256, 256), (300, 256), (512, 512)])
def test_large_layers_fill_their_tiles(M, rows):
    assert rows_at_once(replace(H200, strips=512, steps=224, M=M)) == rows


@pytest.mark.parametrize(("M", "rows"), [(1, 1), (64, 64), (257, 256), (320, 256), (512, 512)])
def test_gradients_of_large_layers_fill_their_tiles(M, rows):
    assert rows_at_once_transposed(replace(H200, strips=512, steps=224, M=M)) == rows


@pytest.mark.parametrize(
    ("N", "K", "M", "kernel"), [(576, 1536, 512, True), (576, 1536, 8192, False), (4096, 4096, 8192, True)]
)
def test_many_rows_of_small_layers_take_floats(N, K, M, kernel):
    problem = replace(H200, strips=N // 16, steps=-(-K // 128), M=M)
    assert isinstance(choose(problem), LargePlan if kernel else DequantizePlan)


@pytest.mark.parametrize(
    ("N", "K", "M", "kernel"),
    [(576, 576, 4096, False), (576, 1536, 8192, False), (4096, 4096, 64, True), (8192, 28672, 1024, True)],
)
def test_gradients_of_small_layers_take_floats(N, K, M, kernel):
    problem = replace(H200, strips=N // 16, steps=-(-K // 128), M=M)
    assert isinstance(choose_transposed(problem), TransposedPlan if kernel else DequantizePlan)


@pytest.fixture(scope="module")
def schedule():
    """Who does what in kernels of warpgroups, as Python functions."""
    module = pytest.importorskip("gptq_triton.kernels.warpgroups")
    transposed = pytest.importorskip("gptq_triton.kernels.transposed")
    assert transposed.STRIPS.value == 4  # of a product, as plans count them
    with pytest.MonkeyPatch.context() as patch:
        for name in ("share", "_shared", "first_tile", "next_tile", "extent", "others", "place"):
            patch.setattr(module, name, getattr(module, name).fn)
        yield module


@given(problems, st.integers(64, 9000), st.data())
def test_the_gradients_programs_share_its_tiles(schedule, problem, M, data):
    problem = replace(problem, M=M, arch="sm_90", half_scales=True, dtype=torch.float16)
    plan = data.draw(st.sampled_from([*transposed_plans(problem)]))
    tiles, units = -(-M // plan.block_m) * problem.steps, -(-problem.strips // (4 * plan.unit))
    check_shares(schedule, plan.shares, tiles, units)


@given(problems, st.integers(17, 9000), st.data())
def test_programs_share_tiles(schedule, problem, M, data):
    problem = replace(problem, M=M, arch="sm_90", half_scales=True, dtype=torch.float16, large=True)
    plan = data.draw(st.sampled_from([plan for plan in candidates(problem) if isinstance(plan, LargePlan)]))
    check_shares(schedule, plan.shares(problem), plan.tiles(problem), problem.steps)


def check_shares(schedule, shares, tiles, units):
    """Every unit of every tile is one program's, and each knows of the others."""
    cut = (*shares, units)
    owners: dict[int, list[tuple[int, int, int]]] = {}
    for p in range(shares.programs):
        tile = schedule.first_tile(p, cut)
        while tile < tiles:
            start, stop = schedule.extent(tile, p, cut)
            assert 0 <= start < stop <= units
            owners.setdefault(tile, []).append((start, stop, p))
            tile = schedule.next_tile(tile, p, cut)
    assert sorted(owners) == list(range(tiles))
    for tile, parts in owners.items():
        parts.sort()
        assert parts[0][0] == 0
        assert [part[0] for part in parts[1:]] + [units] == [part[1] for part in parts]
        first = parts[0][2]
        assert [part[2] for part in parts] == list(range(first, first + len(parts)))
        if len(parts) > 1:
            assert schedule.others(tile, first, cut) == len(parts) - 1
    unfinished = [p for parts in owners.values() for start, _, p in parts if start > 0]
    assert len(set(unfinished)) == len(unfinished)  # a program has room for the sums of one tile
    assert all(p < shares.sharing for p in unfinished)  # which the workspace has
    most = max(
        sum(stop - start for parts in owners.values() for start, stop, q in parts if q == p)
        for p in range(shares.programs)
    )
    assert most == shares.busiest(tiles, units)


@given(st.integers(1, 60), st.integers(1, 40), st.data())
def test_equal_shares_of_tiles_meet(tiles, rounds, data):
    common = pytest.importorskip("gptq_triton.kernels.common")
    share, sharers = common.share.fn, common.sharers.fn
    programs = data.draw(st.integers(1, tiles * rounds))
    owners = {}  # of rounds
    for p in range(programs):
        start, stop = share(p, programs, tiles, rounds)
        assert tiles * rounds // programs <= stop - start <= math.ceil(tiles * rounds / programs)
        owners |= dict.fromkeys(range(start, stop), p)
    assert sorted(owners) == list(range(tiles * rounds))
    for tile in range(tiles):
        first, count = sharers(tile, programs, tiles, rounds)
        assert {owners[tile * rounds + i] for i in range(rounds)} == set(range(first, first + count))


@given(st.integers(1, 40), st.integers(1, 40))
def test_the_gradients_tiles_have_their_places(schedule, blocks_m, steps):
    places = {schedule.place(tile, blocks_m, steps, 8) for tile in range(blocks_m * steps)}
    assert places == {(m, k) for m in range(blocks_m) for k in range(steps)}


def test_persistent_programs_share_the_tiles_evenly():
    plan = DecodePlan(1, 1, 2, 8, 4, 4, 1, True)
    problem = replace(H200, strips=1792)  # 896 tiles: seven for each of 128 programs
    assert plan.programs(problem) == 128
    assert replace(plan, persistent=False).programs(problem) == 896
    assert plan in set(candidates(problem))
    assert plan not in set(candidates(replace(problem, strips=264)))  # a tile for each multiprocessor


@given(st.integers(1, 4000), st.integers(2, 400), st.sampled_from((82, 132)))
def test_even_shares_are_taken_where_tiles_come_out_unevenly(strips, steps, multiprocessors):
    problem = replace(H200, strips=strips, steps=steps, multiprocessors=multiprocessors)
    plans = [plan for plan in candidates(problem) if isinstance(plan, DecodePlan)]
    for plan in plans:
        tiles, rounds = plan.tiles_of_weight(problem), math.ceil(steps / plan.warps_k)
        programs, over_k = plan.grid(problem)
        busiest = plan.rounds(problem) * (1 if plan.even else math.ceil(tiles / programs))
        assert tiles * rounds <= busiest * programs * over_k  # all is done
        if plan.even:
            whole = replace(plan, split=1, persistent=False)
            waves = math.ceil(tiles / multiprocessors)
            assert programs == min(multiprocessors, tiles * rounds)
            assert 2 <= busiest <= waves * whole.rounds(problem)
            assert plan.parts(problem) == programs  # each leaves one at most: of the tile it goes on with


@given(problems)
def test_a_batch_invariant_plan_sums_in_one_order_for_every_m(problem):
    plans = [choose(replace(problem, M=M), batch_invariant=True) for M in range(1, 9)]
    if isinstance(plans[0], DecodePlan):
        plans = [replace(plan, tiles=1) for plan in plans if isinstance(plan, DecodePlan)]
    assert len(set(plans)) == 1


def test_regimes_on_hopper():
    kinds = [type(choose(replace(H200, M=M))) for M in (1, 8, 128, 192, 8192)]
    assert kinds == [DecodePlan, DecodePlan, LargePlan, LargePlan, LargePlan]
    kinds = [type(choose(replace(H200, M=M, large=False))) for M in (1, 8, 17, 64, 192, 193)]
    assert kinds == [DecodePlan, DecodePlan, MatmulPlan, MatmulPlan, MatmulPlan, DequantizePlan]
    assert {type(plan) for plan in candidates(replace(H200, M=12))} == {DecodePlan, WidePlan, LargePlan}


def test_scales_of_32_bits_have_no_digits():
    assert isinstance(choose(replace(H200, half_scales=False)), MatmulPlan)


@pytest.mark.parametrize("M", [1, 8, 16, 64])
def test_more_weight_takes_longer(M):
    times = []
    for strips in (64, 256, 1024, 4096):
        problem = replace(H200, M=M, strips=strips)
        times.append(min(microseconds(problem, plan) for plan in candidates(problem)))
    assert times == sorted(times)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_a_dtype_without_a_kernel_is_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16 or float32 on a GPU"):
        choose(replace(H200, dtype=dtype))
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16 or float32 on a GPU"):
        choose_transposed(replace(H200, dtype=dtype))


def test_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    odd = replace(H200, strips=3, steps=5)
    assert tables.lookup("a-gpu", odd) is None
    plans = {
        tables.case(odd): DecodePlan(1, 1, 2, 4, 2, 4, 3),
        tables.case(replace(odd, M=16)): WidePlan(8, 4, 8, 2, 128),
        tables.case(replace(odd, M=40)): MatmulPlan(64, 128, 2, 4, 3),
        tables.case(replace(odd, M=400)): LargePlan(256, 2, 2, 3),
    }
    assert list(plans) == ["48x640 w4 m1", "48x640 w4 m16", "48x640 w4 m64", "48x640 w4 m512"]
    for name, plan in plans.items():  # one by one: a table grows
        tables.save("a-gpu", {name: plan})
    assert [tables.lookup("a-gpu", replace(odd, M=M)) for M in (1, 9, 33, 500)] == list(plans.values())
    assert tables.lookup("a-gpu", replace(odd, M=2)) is None
    assert tables.lookup("a-gpu", replace(odd, M=400, large=False)) is None
    assert tables.lookup("another", odd) is None
    assert tables.lookup("a-gpu", replace(odd, group_columns=32)) is None
    assert tables.lookup("a-gpu", replace(odd, dtype=torch.float32)) is None
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
    tables._table.cache_clear()


def test_tables_of_weights_with_act_order(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    plain = replace(H200, strips=3, steps=64)
    ordered = replace(plain, ordered=True)
    few, wide, many = (
        DecodePlan(1, 1, 2, 8, 8, 8, 1, own_digits=True),
        WidePlan(8, 4, 8, 2, 128),
        LargePlan(16, 2, 8, 2, 2),
    )
    rows = {1: few, 4: few, 8: wide, 16: many, 32: many}
    tables.save("a-gpu", {tables.case(replace(plain, M=M)): plan for M, plan in rows.items()})
    assert tables.lookup("a-gpu", ordered) == few
    by_launch = replace(few, depth=4, chunk=4, own_digits=False)
    assert tables.lookup("a-gpu", replace(ordered, M=4)) == by_launch  # more than a warp has room for
    assert tables.lookup("a-gpu", replace(ordered, M=8)) == wide
    assert tables.lookup("a-gpu", replace(ordered, M=16)) is None  # digits are put in order by their own launch
    assert tables.lookup("a-gpu", replace(ordered, M=17)) == many
    own = WidePlan(4, 4, 4, 1, 128)
    tables.save("a-gpu", {"48x8192 w4 act-order m16": own})
    assert tables.lookup("a-gpu", replace(ordered, M=16)) == own
    assert tables.lookup("a-gpu", replace(plain, M=16)) == many
    tables._table.cache_clear()


def test_a_plan_of_equal_shares_needs_as_many_multiprocessors(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    problem = replace(H200, strips=320, steps=200)
    even = next(plan for plan in candidates(problem) if isinstance(plan, DecodePlan) and plan.even and plan.own_digits)
    tables.save("a-gpu", {tables.case(problem): even})
    assert tables.lookup("a-gpu", problem) == even
    assert tables.lookup("a-gpu", replace(problem, multiprocessors=20)) is None
    tables._table.cache_clear()


def test_few_rows_with_act_order_are_multiplied_as_digits():
    for strips, steps in ((256, 32), (512, 224), (3200, 40)):
        for M in (4, 8, 16):
            assert isinstance(
                choose(replace(H200, strips=strips, steps=steps, M=M, ordered=True)), (DecodePlan, WidePlan)
            )


def test_the_shipped_table_holds_plans_of_its_cases():
    for name, record in tables.shipped("h200").items():
        shape, width, *other, rows = name.split()
        N, K = map(int, shape.split("x"))
        columns = next((int(word[1:]) for word in other if word[0] == "g"), 128)
        shape_of = {"strips": N // 16, "steps": K // 128, "bits": int(width[1:]), "group_columns": columns}
        problem = replace(H200, M=int(rows[1:]), ordered="act-order" in other, **shape_of)
        assert tables.case(problem) == name
        plan = tables.plan_from(record)  # of these rows, or of more
        assert any(plan in set(candidates(replace(problem, M=M))) for M in tables.BUCKETS if problem.M <= M)
