"""The benchmark registry's arithmetic, bookkeeping and tables: all that needs no GPU."""

import dataclasses
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gptq_triton import reference
from gptq_triton.layout import tile_weight

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import itertools

import e2e
import host
import ledger
import method
import providers
import reading
import speed
import tables
import targets
import weights
from cases import SUITES, Case, Ceilings, only
from shapes import MODELS, layers, shapes, siblings

CEILINGS = Ceilings(4500.0, {"float16": 750.0, "bfloat16": 750.0})
SMALL = Case("matmul", 4, 96, 160, 4, group_size=64)


def row(provider, us, case=SMALL, **more):
    return {"provider": provider, **asdict(case), "us": us, "of_floor": 3 / us, "run": 0, **more}


# --- what is measured


def test_shapes_are_those_of_the_models():
    found = shapes()
    assert len(found) == 18
    assert "Llama-3.1-70B down" in found[8192, 28672]
    assert found[4096, 4096] == ["Llama-3.1-8B o", "Qwen3-8B o", "Mistral-7B o"]
    assert all(K % 32 == 0 for _, K in found), "a word stream would end inside a word"


def test_merged_layers_are_as_wide_as_their_siblings():
    for model in MODELS:
        merged, parts = layers(model), siblings(model)
        assert merged["qkv"].N == parts["q"].N + 2 * parts["k"].N
        assert merged["gate_up"].N == 2 * parts["gate"].N
        assert {part.K for part in parts.values()} == {merged["qkv"].K}


def test_floor_counts_every_byte_once():
    case = Case("matmul", 2, 8192, 28672, 4)
    nbytes = 8192 * 28672 // 2 + 224 * 8192 * 4 + 2 * 2 * (8192 + 28672)
    assert case.nbytes() == nbytes
    assert CEILINGS.floor_us(case) == pytest.approx(nbytes / 4500e9 * 1e6)
    assert Case("matmul", 2, 64, 576, 4).weight_nbytes() == 64 * 576 // 2 + 5 * 64 * 4, "576 columns are 5 groups"
    assert Case("matmul", 2, 64, 576, 3, group_size=-1).weight_nbytes() == 64 * 576 * 3 // 8 + 64 * 4
    assert case.nbytes(dense=True) == 2 * 8192 * 28672 + 2 * 2 * (8192 + 28672)


def test_floor_of_many_rows_is_the_tensor_cores():
    case = Case("matmul", 8192, 8192, 8192, 2)
    assert CEILINGS.floor_us(case) == pytest.approx(2 * 8192**3 / 750e12 * 1e6)


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_suites_keep_a_weights_cases_together(suite):
    cases = SUITES[suite]()
    assert len({*cases}) == len(cases)
    changes = sum(a.weight != b.weight for a, b in itertools.pairwise(cases))
    assert changes == len({case.weight for case in cases}) - 1


def test_only_filters():
    cases = SUITES["decode"]()
    found = only(cases, ["model=Mistral-7B", "bits=4,8", "m=1"])
    assert {(case.N, case.K) for case in found} == {(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)}
    assert {(case.bits, case.M) for case in found} == {(4, 1), (8, 1)}
    assert len(only(cases, ["shape=4096x4096"])) == 28
    for wrong in ("width=4", "model=GPT-2"):
        with pytest.raises(ValueError, match="must"):
            only(cases, [wrong])


@pytest.mark.parametrize("nbytes", [1000, 9_000_000, 150_000_000, 10**9])
def test_copies_are_cold_and_equally_used(nbytes):
    copies = method.copies_of(nbytes)
    assert copies >= 2
    assert copies * nbytes > 200e6
    calls = method.calls_of(copies, floor_us=nbytes / 4.5e6)
    assert calls >= 8
    assert calls % copies == 0


# --- weights


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("change", [{}, {"act_order": True}, {"group_size": -1}, {"sym": True}, {"dtype": "bfloat16"}])
def test_random_weights_are_random_and_of_unit_size(bits, change):
    case = Case(**(asdict(SMALL) | {"bits": bits} | change))
    weight = weights.random_weight(case, "cpu")
    codes, scales, zeros = weights.codes_of(weight)
    assert len(codes.unique()) == min(2**bits, len(codes.unique()))
    assert scales.dtype == getattr(torch, case.dtype)
    assert bool((zeros == 2 ** (bits - 1)).all()) == case.sym
    assert 0.3 < (torch.randn(64, case.K) @ reference.dequantize(weight).float()).std() < 3


@pytest.mark.parametrize("act_order", [False, True])
def test_exact_products_by_slabs(monkeypatch, act_order):
    monkeypatch.setattr(weights, "SLAB", 32)
    case = Case("matmul", 5, 80, 160, 3, group_size=64, act_order=act_order)
    weight = weights.random_weight(case, "cpu")
    W = reference.dequantize(weight, torch.float64)
    x, dy = torch.randn(5, case.K), torch.randn(5, case.N)
    torch.testing.assert_close(weights.exact(x, weight, "matmul"), x.double() @ W)
    torch.testing.assert_close(weights.exact(dy, weight, "matmul_transposed"), dy.double() @ W.t())


def test_checked_rows_have_both_ends():
    assert weights.checked_rows(3).tolist() == [0, 1, 2]
    rows = weights.checked_rows(8192)
    assert len(rows) == 256
    assert (int(rows[0]), int(rows[-1])) == (0, 8191)


# --- measuring, with a clock that is made up


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(speed, "capture", lambda calls, times: [call() for call in calls])
    monkeypatch.setattr(speed, "interleaved", lambda captured, preheat: dict.fromkeys(captured, 2.0))
    monkeypatch.setattr(speed, "copies_of", lambda nbytes: 2)


class Broken(providers.CuBLAS):
    name = "broken"

    def __init__(self, how):
        self.how = how

    def bind(self, layer, x, case):
        if self.how == "raises":
            raise RuntimeError("no kernel image")
        return lambda: torch.full((case.M, case.N), torch.nan if self.how == "nan" else 0.0)


@pytest.mark.parametrize("op", ["matmul", "matmul_transposed"])
def test_a_case_becomes_rows(no_gpu, op):
    case = Case(**(asdict(SMALL) | {"op": op, "M": 300}))
    bench = speed.Bench([SMALL, case] if op == "matmul" else [case], CEILINGS, device="cpu")
    (found,) = bench.measure(case, [providers.CuBLAS()])
    assert found["us"] == 2.0
    assert found["rel_err"] < 1e-3
    assert found["tflops"] == pytest.approx(case.flops / 2e6, abs=0.01)
    assert found["of_floor"] == pytest.approx(CEILINGS.floor_us(case, dense=True) / 2, rel=0.01)


@pytest.mark.parametrize("how", ["raises", "nan", "zeros"])
def test_a_failing_peer_is_a_row_and_the_others_go_on(no_gpu, how):
    bench = speed.Bench([SMALL], CEILINGS, device="cpu")
    broken, refused, fine = bench.measure(SMALL, [Broken(how), providers.TinyGemm(), providers.CuBLAS()])
    assert "us" not in broken
    assert ("no kernel image" if how == "raises" else "wrong result") in broken["error"]
    assert "skipped" in refused
    assert fine["us"] == 2.0


def test_a_missing_peer_is_a_row(no_gpu):
    pytest.importorskip("triton")
    if "humming" in sys.modules:
        pytest.skip("humming is installed")
    (found,) = speed.Bench([SMALL], CEILINGS, device="cpu").measure(
        Case(**(asdict(SMALL) | {"group_size": 32})), [providers.Humming(sym=False)]
    )
    assert "humming" in found["error"]


def test_ours_multiplies_by_tiles(no_gpu, monkeypatch):
    tiled = []
    monkeypatch.setattr(providers, "tile_weight", lambda weight: tiled.append(weight) or tile_weight(weight))
    monkeypatch.setattr(providers.Ours, "plan", lambda self, case: "a plan")
    (found,) = speed.Bench([SMALL], CEILINGS, device="cpu").measure(SMALL, [providers.Ours()])
    assert len(tiled) == 1, "copies are clones"
    assert found["rel_err"] < 1e-3
    assert found["plan"] == "a plan"


def test_copies_have_memory_of_their_own():
    weight = weights.random_weight(SMALL, "cpu")
    other = providers._clone(weight)
    assert torch.equal(weight.qweight, other.qweight)
    assert weight.qweight.data_ptr() != other.qweight.data_ptr()
    assert other.g_idx is None


def test_comparisons_within_a_case():
    rows = [row("ours", 2.0), row("cublas", 6.0), row("humming", 3.0), {"provider": "gemlite", "error": "no"}]
    ledger.compare(rows)
    assert (rows[0]["vs_cublas"], rows[0]["vs_best_peer"]) == (3.0, 1.5)
    assert rows[1]["vs_best_peer"] == 0.5
    assert "vs_cublas" not in rows[3]


def test_host_time_takes_turns(monkeypatch):
    monkeypatch.setattr(host, "BATCH", 2)
    monkeypatch.setattr(host, "BATCHES", 3)
    calls = []
    found = host.host_us({name: lambda name=name: calls.append(name) for name in "ab"}, lambda: calls.append("wait"))
    assert set(found) == {"a", "b"}
    assert calls[4:10] == ["wait", "a", "a", "wait", "b", "b"]


# --- result files


def test_a_stopped_run_goes_on(tmp_path):
    path = tmp_path / "decode.json"
    first = ledger.Ledger(path, {"commit": "a"})
    first.add([row("ours", 2.0), row("cublas", 6.0)])
    first.add([row("ours", 3.0, Case("matmul", 8, 96, 160, 4)), {"provider": "cublas", **asdict(SMALL), "error": "x"}])
    again = ledger.Ledger(path, {"commit": "b"})
    assert again.has(row("ours", 9.0))
    assert again.has(row("cublas", 9.0)), "what failed is not tried again by itself"
    assert not again.has(row("humming", 9.0))
    assert not ledger.Ledger(path, {"commit": "b"}, retry=True).has(row("cublas", 9.0))
    again.again([row("ours", 9.0)])
    assert not again.has(row("ours", 9.0))
    assert again.has(row("cublas", 9.0))
    renewed = ledger.Ledger(path, {"commit": "b"}, renew=True)
    assert not renewed.has(row("ours", 9.0))
    renewed.add([row("ours", 1.0)])
    assert renewed.has(row("ours", 9.0))
    content = json.loads(path.read_text())
    assert [run["commit"] for run in content["runs"]] == ["a", "b"]
    assert len(content["rows"]) == 3
    assert content["rows"][-1] | {"us": 1.0, "run": 1} == content["rows"][-1]
    assert content["commit"] == "b"
    assert sum('"provider"' in line for line in path.read_text().splitlines()) == 3, "a row takes a line"


def test_cases_with_another_plan_are_measured_again(monkeypatch):
    monkeypatch.setattr(providers.Ours, "plan", lambda self, case: f"tiles={case.M}")
    cases = [dataclasses.replace(SMALL, M=M) for M in (1, 2, 8)]
    rows = [row("ours", 2.0, cases[0], plan="tiles=1"), row("ours", 2.0, cases[1], plan="tiles=4")]
    rows += [row("cublas", 6.0, case, plan=None) for case in cases]
    assert speed.changed(rows, cases) == [cases[1]], "the last was not measured at all"
    assert speed.changed(rows, cases[:1]) == []


def test_cases_of_a_kernel_that_changed_are_measured_again(tmp_path):
    cases = [dataclasses.replace(SMALL, M=M) for M in (1, 2, 8)]
    first = ledger.Ledger(tmp_path / "x.json", {"commit": "a"})
    first.add([row("ours", 2.0, case, plan=f"tiles={case.M}") for case in cases])
    second = ledger.Ledger(tmp_path / "x.json", {"commit": "b"})
    assert speed.planned(second, cases, "tiles=8") == [cases[2]]
    assert speed.planned(second, cases[:1], "tiles=8") == []
    second.add([row("ours", 1.0, cases[2], plan="tiles=8")])
    assert speed.planned(second, cases, "tiles=8") == [], "this commit measured it"
    assert speed.planned(second, cases, "tiles=") == cases[:2]


def test_only_peers_of_the_same_run_count():
    found = reading.cells([row("ours", 2.0), row("cublas", 6.0), row("humming", 3.0, run=1)])
    assert set(found[SMALL]) == {"ours", "cublas"}
    assert reading.speedups(found, "cublas") == {SMALL: 3.0}
    assert reading.geomean([1, 4]) == pytest.approx(2)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results in which everything is as fast: 2 us, cuBLAS 4 us, humming 3 us."""
    machine = {"gpu": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "method": "as said"}
    for suite in ("decode", "prefill", "backward", "variants"):
        rows = []
        for case in SUITES[suite]():
            errors = {"rel_err": 2e-4, "cublas_rel_err": 2e-4}
            rows += [row("ours", 2.0, case, **errors), row("cublas", 4.0, case), row("humming", 3.0, case)]
        (tmp_path / f"{suite}.json").write_text(json.dumps(machine | {"rows": rows}))
    models = [
        {"job": job, "kind": kind, "ms": 9.0, "tokens_per_s": 99.0, "vs_fp16": fast, "weights_gb": size}
        for job in e2e.JOBS
        for kind, fast, size in (("fp16", 1.0, 16.0), ("4-bit", 2.5, 5.0))
    ]
    (tmp_path / "e2e.json").write_text(json.dumps(machine | {"rows": models}))
    ways = [
        {"job": "generate-1", "kind": "4-bit", "way": way, "vs_loop": fast}
        for way, fast in (("graphed", 1.1), ("static", 0.5))
    ]
    (tmp_path / "generate.json").write_text(json.dumps(machine | {"rows": ways}))
    shares = [
        {"job": "decode-1", "kind": "one", "ms": 2.0},
        {"job": "decode-1", "kind": "two", "ms": 1.5, "share": 0.6},
    ]
    (tmp_path / "parallel.json").write_text(json.dumps(machine | {"rows": shares}))
    monkeypatch.setattr(tables, "GPU", tmp_path)
    return tmp_path


def test_tables_from_results(results):
    text = tables.generate("<!-- quality -->\n<!-- /quality -->\n<!-- speed -->\nold\n<!-- /speed -->\n")
    assert "| 4096 x 4096 | 4 | 2.0 (1.50) | 2.0 (1.50) | 2.0 (1.50) | 1.50 | 2.00 |" in text
    assert "| all | 3 | (1.50) | (1.50) | (1.50) | 1.50 | 2.00 |" in text
    assert "| 4 | 2.00 (1.50) |" in text
    assert "| decode-1, 4-bit | 5.0 GB | 9.00 | 99 | 2.50 |" in text
    assert "old" not in text
    assert tables.generate(text) == text


def test_no_results_no_section(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "GPU", tmp_path)
    text = tables.generate("<!-- quality -->\n<!-- /quality -->\n<!-- speed -->\nold\n<!-- /speed -->\n")
    assert text.endswith("<!-- speed -->\n<!-- /speed -->\n")


def test_plots_are_the_same_each_time(results):
    pytest.importorskip("matplotlib")
    import plots

    plots.main(results)
    first = {path.name: path.read_bytes() for path in results.glob("*.svg")}
    plots.main(results)
    assert {*first} == {*tables.PLOTS}
    assert first == {path.name: path.read_bytes() for path in results.glob("*.svg")}
    assert "bench/results/h200/floor.svg" in tables.speed()


def test_targets_are_judged(results):
    report = targets.report(targets.Results(results))
    assert "not measured  QuantLinear(x)" in report
    rows = json.loads((results / "decode.json").read_text())["rows"]
    measured = {
        tuple(r[name] for name in ("N", "K", "bits", "M")) for r in rows if r["provider"] == "ours" and "us" in r
    }
    assert f"{len(measured)} of 504 cases of decode are measured" in report.splitlines()
    verdicts = {line[24:]: line[:6] for line in report.splitlines() if line[:3] in ("met", "MIS")}
    assert any("humming" in text for text in verdicts)
    missed = {text for text, verdict in verdicts.items() if verdict == "MISSED"}
    assert all("M = 128" not in text for text in missed)
    found = {target.text: target for target in targets.TARGETS}
    four = found["4-bit, M <= 16, layers of 64 MB and more: fraction of the floor"]
    assert four.measured(targets.Results(results)) == pytest.approx(1.5)
    assert {key.split()[1] for key in four.values(targets.Results(results))} == {
        "57344x8192",
        "51200x5120",
        "8192x28672",
        "5120x25600",
    }
    assert "met       1.100 >= 1  generate with GraphedDecoding" in report
    assert "MISSED    0.600 <= 0.55  two GPUs" in report
    assert found["M <= 64: times humming's speed, mean"].met(targets.Results(results))
    assert not found["prefill M = 64, 4-bit layers of 64 MB and more: times the speed of cuBLAS"].bound > 2
    assert found["model, batch 1: times the tokens/s of fp16"].values(targets.Results(results)) == {
        "decode-1 4-bit": 2.5
    }


def test_a_missed_target_names_its_worst_cases(results):
    content = json.loads((results / "decode.json").read_text())
    slow = next(r for r in content["rows"] if r["provider"] == "ours" and (r["N"], r["M"], r["bits"]) == (57344, 2, 4))
    slow["us"], slow["of_floor"] = 6.0, 0.5
    (results / "decode.json").write_text(json.dumps(content))
    lines = targets.report(targets.Results(results)).splitlines()
    at = next(i for i, line in enumerate(lines) if "4-bit, M <= 16" in line)
    assert lines[at].startswith("MISSED    0.500 >= 0.8")
    assert lines[at + 1].split() == ["0.500", "w4", "57344x8192", "M=2"]


# --- whole models


def test_a_quantized_model_and_its_adapters():
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = e2e.quantized(e2e.llama(1, "cpu", vocab_size=100, **sizes), 4)
    kinds = {type(layer).__name__ for layer in e2e.decoder_layers(model)}
    assert kinds == {"QuantLinear"}
    assert len(e2e.decoder_layers(model)) == 7
    ids = torch.arange(6)[None]
    before = model(ids).logits
    assert torch.isfinite(before).all()
    e2e.lora(model)
    torch.testing.assert_close(model(ids).logits, before)  # an adapter's second factor starts at zero
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_every_kernel_of_every_case_is_compiled_ahead_once():
    import ahead
    import tune

    from gptq_triton import dispatch, plans

    cases = [(28672, 4096, 4, 128, False), (4096, 4096, 4, 128, True), (4096, 4096, 8, 128, False)]
    every = list(tune.jobs(cases, "sm_90", 132))
    found = ahead.distinct(every)

    def kernel(problem: plans.Problem, plan: plans.FusedPlan) -> tuple:
        own = isinstance(plan, plans.DecodePlan) and plan.own_digits
        rows = plan.rows(problem) if isinstance(plan, plans.WidePlan) else problem.M if own else None
        return problem.bits, rows, dataclasses.replace(plan, split=min(plan.split, 2))

    kernels = [kernel(*job) for job in found]
    assert len(set(kernels)) == len(kernels)
    assert set(kernels) == {kernel(*job) for job in every if not isinstance(job[1], plans.MatmulPlan)}
    for problem, plan in found:
        assert plan in set(dispatch.candidates(problem))
    assert {problem.bits for problem, _ in found} == {4, 8}


def test_a_model_is_split_for_two_gpus():
    pytest.importorskip("transformers")
    import parallel
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = e2e.quantized(e2e.llama(1, "cpu", vocab_size=100, **sizes), 4)
    whole = e2e.nbytes(model.model.layers)
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        parallel.split(model, distributed.init_device_mesh("cpu", (2,)))
    finally:
        distributed.destroy_process_group()
    layers = e2e.decoder_layers(model)
    assert all(layer.infeatures * layer.outfeatures * 2 == layer.in_features * layer.out_features for layer in layers)
    assert 0.5 < e2e.nbytes(model.model.layers) / whole <= 0.55
