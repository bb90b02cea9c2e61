"""Products on a GPU as far as they can be followed without one: kernels are replaced by what they are to compute."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_triton import dispatch, launches, plans, product, tables, tuning
from gptq_triton.layout import TiledWeight, tile_weight, unpack_meta, untile
from gptq_triton.linear import QuantLinear
from gptq_triton.plans import DecodePlan, MatmulPlan, WidePlan
from tests.strategies import assert_close, random_rows, random_weight


def floats(words: Tensor, meta: Tensor, scales: Tensor | None, bits: int, group_columns: int, bf16: bool) -> Tensor:
    """W in the order of the tiles, (columns, rows) float64."""
    dtype = torch.float32 if scales is not None else torch.bfloat16 if bf16 else torch.float16
    codes = untile(words, bits).double()
    scale, zero = unpack_meta(meta, scales, dtype)
    group = torch.arange(len(codes)) // group_columns
    return scale.double()[group] * (codes - zero[group])


class Kernels:
    """Stands for every module of kernels; remembers the launches of those that take addresses."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any], tuple[Any, ...]]] = []

    def __call__(self, name: str) -> Any:
        return self

    def _prepare(self, name: str, *given: Any, **options: Any) -> Any:
        return lambda *arguments: self.launches.append((name, options, arguments))

    def prepare_digits(self, *given: Any, **options: Any) -> Any:
        return self._prepare("digits", *given, **options)

    def prepare_decode(self, *given: Any, **options: Any) -> Any:
        return self._prepare("decode", *given, **options)

    def prepare_wide(self, *given: Any, **options: Any) -> Any:
        return self._prepare("wide", *given, **options)

    def prepare_large(self, device, dtype, bias_dtype, *, bits, scales_bf16, group_columns, pdl, shares, **plan) -> Any:
        def launch(cut, stream, x, words, meta, y, bias, workspace, counters) -> None:
            assert x.stride(0) % 8 == y.stride(0) % 8 == 0
            assert cut.programs <= 132 * plan["resident"]
            assert shares == (cut.streamed > 0) == (workspace is not None) == (counters is not None)
            if shares:
                assert workspace.numel() == cut.sharing * plan["block_m"] * 64 * plan["groups"]
                assert counters.numel() == cut.streamed * plan["groups"]
            assert dtype == y.dtype
            assert bias_dtype == (None if bias is None else bias.dtype)
            self.launches.append(("large", plan, cut))
            self.matmul(
                x, words, meta, None, bias, y, None, None,
                bits=bits, group_columns=group_columns, scales_bf16=scales_bf16, split=1,
            )  # fmt: skip

        return launch

    def gather(self, x: Tensor, order: Tensor, out: Tensor, *, pdl: bool) -> None:
        out.copy_(torch.where(order >= 0, x[:, order.clamp(min=0).long()], 0))

    def dequantize(self, words, meta, scales, out, *, bits, group_columns, scales_bf16, first_strip, ptx, pdl):
        w = floats(words, meta, scales, bits, group_columns, scales_bf16).t()
        out.copy_(w[16 * first_strip : 16 * first_strip + len(out), : out.shape[1]])

    def matmul(self, x, words, meta, scales, bias, y, workspace, counters, *, bits, group_columns, scales_bf16, **plan):
        assert (workspace is None) == (counters is None) == (plan["split"] == 1)
        if workspace is not None:
            assert workspace.numel() >= plan["split"] * len(x) * 16 * len(words)
            tiles = math.ceil(len(x) / plan["block_m"]) * math.ceil(16 * len(words) / plan["block_n"])
            assert counters.numel() >= tiles
        w = floats(words, meta, scales, bits, group_columns, scales_bf16)
        out = x.double() @ w[: x.shape[1], : y.shape[1]]
        y.copy_(out if bias is None else out + bias.double())

    def prepare_transposed(self, device: int, dtype: torch.dtype, *, bits, scales_bf16, group_columns, **plan):
        def multiply(shares, stream, dy, words, meta, dx, workspace, counters):
            assert dy.data_ptr() % 16 == dy.stride(0) % 8 == dx.stride(0) % 8 == 0
            assert dy.stride(1) == 1
            w = floats(words, meta, None, bits, group_columns, scales_bf16)
            dx.copy_(dy.double() @ w[: dx.shape[1], : dy.shape[1]].t())
            self.launches.append(("transposed", plan, (shares, workspace, counters)))

        return multiply


class Scratch:
    """Memory that says how much of it was asked for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.memory, self.zeros = torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32)

    def tensors(self, stream: int, words: int, counters: int) -> tuple[Tensor, Tensor]:
        self.memory = torch.empty(words, dtype=torch.int32)
        self.zeros = torch.zeros(counters, dtype=torch.int32)
        return self.memory, self.zeros

    def get(self, stream: int, words: int, counters: int) -> tuple[int, int]:
        memory, zeros = self.tensors(stream, words, counters)
        return memory.data_ptr(), zeros.data_ptr()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one H200 whose tensors are on the CPU."""
    kernels, scratch = Kernels(), Scratch()
    monkeypatch.setattr(launches, "kernels", kernels)
    monkeypatch.setattr(launches, "scratch_of", lambda device: scratch)
    monkeypatch.setattr(product, "gpu", lambda device: ("sm_90", 132))
    monkeypatch.setattr(product, "gpu_name", lambda device: "h200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda device: threading.Lock())
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    product.forget()
    yield SimpleNamespace(kernels=kernels, scratch=scratch)
    product.forget()


@pytest.mark.parametrize("group_size", [128, 32, 100, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("M", [17, 64, 192, 193, 300])
def test_rows_of_regimes_without_digits(gpu, M, act_order, group_size):
    weight = random_weight(300, 90, 3, group_size, act_order=act_order, checkpoint_format="gptq_v2")
    tiled = tile_weight(weight)
    x = random_rows(M, 300, torch.float16)
    bias = random_rows(1, 90, torch.float16, seed=1)[0]
    assert_close(product.product(x, bias, tiled), x, weight, bias)
    assert_close(product.product(x[:, :300].t().contiguous().t(), None, tiled), x, weight)
    deep = product.product(x.view(1, M, 300), None, tiled)
    assert deep.shape == (1, M, 90)
    assert_close(deep[0], x, weight)
    dy = random_rows(M, 90, torch.float16)
    assert_close(product.product_transposed(dy, tiled), dy, weight, transposed=True)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("view", [(300, 256), (3, 100, 256)])
def test_rows_that_do_not_fill_tiles_are_multiplied_by_launches_of_their_own(gpu, monkeypatch, view, act_order):
    for name in ("rows_at_once", "rows_at_once_transposed"):
        monkeypatch.setattr(dispatch, name, lambda problem, **_: min(problem.M, 128))
    weight = random_weight(256, 96, 4, 128, act_order=act_order)
    tiled, bias = tile_weight(weight), random_rows(1, 96, torch.float16, seed=1)[0]
    x = random_rows(300, 256, torch.float16)
    y = product.product(x.view(view), bias, tiled)
    assert y.shape == (*view[:-1], 96)
    assert_close(y.view(300, 96), x, weight, bias)
    wide = random_rows(300, 264, torch.float16)[:, :256]
    assert_close(product.product(wide, bias, tiled), wide, weight, bias)
    assert [part.M for part, _ in product.plans_of(product.problem_of(300, torch.float16, 0, tiled), 0)] == [
        128,
        128,
        44,
    ]


@pytest.mark.parametrize(("M", "N", "K", "shared"), [(64, 96, 1024, True), (300, 1040, 128, False)])
@pytest.mark.parametrize("act_order", [False, True])
def test_many_rows_take_their_kernel(gpu, M, N, K, shared, act_order):
    weight = random_weight(K, N, 4, 128, act_order=act_order)
    x, bias = random_rows(M, K, torch.bfloat16), random_rows(1, N, torch.bfloat16, seed=1)[0]
    assert_close(product.product(x, bias, tile_weight(weight)), x, weight, bias)
    ((name, _, cut),) = gpu.kernels.launches
    assert (name, cut.streamed > 0) == ("large", shared)


@pytest.mark.parametrize(("M", "N", "K", "group_size", "act_order"), [
    (64, 96, 304, 32, False), (300, 1040, 1000, 100, True), (4000, 512, 1024, 128, False), (513, 4096, 256, -1, False),
])  # fmt: skip
def test_gradients_of_many_rows_take_their_kernel(gpu, monkeypatch, M, N, K, group_size, act_order):
    def fastest(problem, **_):
        return min(dispatch.transposed_plans(problem), key=lambda plan: dispatch.transposed_microseconds(problem, plan))

    monkeypatch.setattr(dispatch, "choose_transposed", fastest)
    weight = random_weight(K, N, 4, group_size, act_order=act_order)
    tiled = tile_weight(weight)
    dy = random_rows(M, N, torch.bfloat16)
    unaligned = torch.empty(M * N + 1, dtype=dy.dtype)[1:].view(M, N).copy_(dy)
    spaced = torch.zeros(M, N + 3, dtype=dy.dtype)[:, :N].copy_(dy)
    for same in (
        dy,
        dy.t().contiguous().t(),
        unaligned,
        spaced,
        torch.zeros(M, 2 * N, dtype=dy.dtype)[:, N:].copy_(dy),
    ):
        gpu.kernels.launches.clear()
        dx = product.product_transposed(same, tiled)
        assert_close(dx, dy, weight, transposed=True)
        ((name, plan, (shares, workspace, counters)),) = gpu.kernels.launches
        assert name == "transposed"
        assert (workspace, counters) == (gpu.scratch.memory.data_ptr(), gpu.scratch.zeros.data_ptr())
        assert gpu.scratch.memory.numel() == (shares.sharing * 128 * plan["block_m"] if shares.streamed else 0)
        assert gpu.scratch.zeros.numel() == 2 * shares.streamed


def test_rows_that_start_anywhere_are_multiplied_by_slabs(gpu):
    for K, N in ((304, 90), (300, 96)):
        weight = random_weight(K, N, 4, 32)
        dy = random_rows(300, N, torch.float16)
        assert_close(product.product_transposed(dy, tile_weight(weight)), dy, weight, transposed=True)
    assert not gpu.kernels.launches


def test_slabs(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "SLAB_BYTES", 16 * 256 * 2 * 2)  # two strips at a time
    weight = random_weight(256, 90, 4, 64, act_order=True)
    tiled = tile_weight(weight)
    x, dy = random_rows(300, 256, torch.float16), random_rows(300, 90, torch.float16)
    bias = random_rows(1, 90, torch.float16, seed=1)[0]
    assert_close(product.product(x, bias, tiled), x, weight, bias)
    assert_close(product.product_transposed(dy, tiled), dy, weight, transposed=True)


def test_the_vendor_may_add_halves_again_afterwards():
    settings = torch.backends.cuda.matmul
    names = "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"
    before = [getattr(settings, name) for name in names]
    try:
        for allowed in ((True, False), (True, True)):
            for name, value in zip(names, allowed, strict=True):
                setattr(settings, name, value)
            with contextlib.suppress(ZeroDivisionError), launches._sums_of_floats():
                assert not any(getattr(settings, name) for name in names)
                raise ZeroDivisionError
            assert tuple(getattr(settings, name) for name in names) == allowed
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("group_size", "M"),
    [*((128, M) for M in (1, 4, 5, 8, 12, 16)), (64, 2), (64, 7), (64, 16), (32, 1), (32, 2), (32, 4)],
)
@pytest.mark.parametrize("multiprocessors", [132, 5])  # which tiles do not share evenly
def test_launches_on_digits_fit_their_memory(gpu, M, group_size, act_order, multiprocessors):
    weight = random_weight(1536, 530, 4, group_size, act_order=act_order)
    tiled = tile_weight(weight)
    order = None if tiled.order is None else tiled.order.data_ptr()
    bias = torch.zeros(530, dtype=torch.float16)
    x = random_rows(M, 1536, torch.float16)
    problem = replace(product.problem_of(M, torch.float16, 0, tiled), multiprocessors=multiprocessors)
    for plan in dispatch.candidates(problem):
        if isinstance(plan, MatmulPlan):
            continue
        gpu.kernels.launches.clear()
        y = torch.empty(M, 530, dtype=torch.float16)
        operands = launches.Operands.of(tiled, bias, True)
        launches.prepare_launch(problem, plan, operands, 0)(x, 1536, bias, tiled, y)
        if isinstance(plan, DecodePlan) and plan.own_digits:
            ((kind, taken, main),) = gpu.kernels.launches
            assert (kind, taken["own_rows"], taken["aligned"]) == ("decode", M, True)
            assert taken["numbers"] == (2048 if act_order else 0)
            partial, zeros = gpu.scratch.memory, gpu.scratch.zeros
            met = (partial.data_ptr(), zeros.data_ptr()) if plan.split > 1 else (None, None)
            assert main == (
                *plan.grid(problem), 0, x.data_ptr(), order, None, None, tiled.words.data_ptr(),
                tiled.meta.data_ptr(), bias.data_ptr(), y.data_ptr(), *met, M, 530, 1536, tiled.steps, 34, 1536, 530,
            )  # fmt: skip
            if plan.split > 1:
                assert zeros.numel() == math.ceil(34 / plan.strips_of_program)
                of_a_part = plan.strips_of_program * 16 * 4 // (128 // group_size)
                assert partial.numel() == plan.parts(problem) * of_a_part
            continue
        (_, taken, digits), (kind, _, main) = gpu.kernels.launches
        assert main[3:5] == (None, None)
        assert main[13:] == (M, 530, 1536, tiled.steps, 34, 1536, 530)
        main = (*main[:3], *main[5:13])
        memory, tiles = gpu.scratch.memory, math.ceil(34 / plan.strips_of_program)
        begin, end = memory.data_ptr(), memory.data_ptr() + 4 * memory.numel()
        in_turn = isinstance(plan, WidePlan) or plan.in_turn
        subgroups, turns = (1, 128 // group_size) if in_turn else (128 // group_size, 1)
        rows = 8 * math.ceil(M / 8) if isinstance(plan, WidePlan) else 4 // subgroups * plan.tiles
        columns = 2 * (rows if isinstance(plan, WidePlan) else 4 * plan.tiles)  # of digits
        assert kind == ("wide" if isinstance(plan, WidePlan) else "decode")
        assert (taken["subgroups"], taken["turns"]) == (subgroups, turns)
        assert digits[:2] == (tiled.steps, M)
        assert digits[3:7] == (x.data_ptr(), order, *main[3:5])
        assert digits[7:] == (1536, 1536)
        assert main[3] == begin
        assert main[4] - main[3] == 4 * tiled.steps * columns * 32  # digits of 128 columns, as words
        after = main[4] + 4 * tiled.steps * columns * turns  # units and sums
        assert main[5:9] == (tiled.words.data_ptr(), tiled.meta.data_ptr(), bias.data_ptr(), y.data_ptr())
        if plan.split == 1:
            assert main[9:11] == (None, None)
            assert end == after
        else:
            assert main[9] == after
            assert end - after == 4 * plan.parts(problem) * plan.strips_of_program * 16 * rows
            assert main[10] == gpu.scratch.zeros.data_ptr()
            assert gpu.scratch.zeros.numel() == tiles
        assert main[:2] == plan.grid(problem)


def test_a_warm_call_is_looked_up_with_the_weight(gpu, monkeypatch):
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    x = random_rows(1, 256, torch.float16)
    product.product(x, None, tiled)
    other = tile_weight(random_weight(256, 64, 4, 128, seed=1))
    prepared = product._prepared.cache_info().misses
    product.product(x, None, other)  # of the same shape: compiled already
    assert product._prepared.cache_info().misses == prepared
    gpu.kernels.launches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(product, "_prepared", None)
        product.product(x, None, tiled)
    assert gpu.kernels.launches[-1][2][7] == tiled.words.data_ptr()


def test_batch_invariance_takes_eight_rows_at_a_time(gpu):
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    product.product(random_rows(19, 256, torch.float16), None, tiled, batch_invariant=True)
    rows = [arguments[1] for name, _, arguments in gpu.kernels.launches if name == "digits"]
    assert rows == [8, 8, 3]
    plans = [options for name, options, _ in gpu.kernels.launches if name == "decode"]
    assert len({(plan["warps_k"], plan["split"]) for plan in plans}) == 1


def test_copies_take_nothing_compiled_along(gpu):
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    product.product(random_rows(1, 256, torch.float16), None, tiled)
    assert tiled.launches
    for twin in (copy.deepcopy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert twin.launches == {}
        assert torch.equal(twin.words, tiled.words)


def test_no_rows(gpu):
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    assert product.product(torch.empty(2, 0, 256), None, tiled).shape == (2, 0, 64)


def test_a_table_outweighs_the_estimate(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    plan = DecodePlan(1, 1, 1, 2, 1, 1, 1)
    tables.save("h200", {tables.case(product.problem_of(1, torch.float16, 0, tiled)): plan})
    product.product(random_rows(1, 256, torch.float16), None, tiled)
    assert gpu.kernels.launches[-1][1]["warps_k"] == 2
    tables._table.cache_clear()


def test_what_cannot_be_tuned():
    with pytest.raises(ValueError, match="layers must hold at least one QuantLinear on a GPU: nothing to tune"):
        tuning.tune(torch.nn.Sequential(QuantLinear(4, 32, 64, 32)))
    tiled = tile_weight(random_weight(256, 64, 4, 128))
    with pytest.raises(ValueError, match=r"rows must lie in \[1, 1024\], got \[1025\]"):
        tuning.tune([tiled], rows=[1025])


def test_tuning_keeps_the_fastest(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_TRITON_CACHE", str(tmp_path))
    tables._table.cache_clear()
    timed: list[tuple[int, Any]] = []

    def time(problem: plans.Problem, plan: Any, copies: list[TiledWeight]) -> float:
        timed.append((problem.M, plan))
        return math.inf if isinstance(plan, DecodePlan) and plan.split != 2 else 1.0 + len(timed) / 1e4

    winners: dict[int, Any] = {}

    def in_turns(problem: plans.Problem, finalists: list[Any], copies: list[TiledWeight]) -> list[float]:
        assert 1 < len(finalists) <= 4
        winners[problem.M] = finalists[-1]
        return [1.0] * (len(finalists) - 1) + [0.5]

    monkeypatch.setattr(tuning, "_time", time)
    monkeypatch.setattr(tuning, "_in_turns", in_turns)
    monkeypatch.setattr(tuning, "_copies", lambda weight: [weight])
    lines: list[str] = []
    tiled = tile_weight(random_weight(4096, 64, 4, 128))
    best = tuning.tune([tiled, tiled], rows=(3, 40), say=lines.append)
    assert list(best) == ["64x4096 w4 m4", "64x4096 w4 m64"]
    assert (3, best["64x4096 w4 m64"]) in timed  # which might be faster for fewer rows too
    assert isinstance(best["64x4096 w4 m4"], DecodePlan)
    assert best["64x4096 w4 m4"].split == 2
    assert len(lines) == 2  # a shape is tuned once
    assert winners[3] == best["64x4096 w4 m4"]  # times in turns decide
    assert tables.lookup("h200", product.problem_of(3, torch.float16, 0, tiled)) == best["64x4096 w4 m4"]
    tables._table.cache_clear()
