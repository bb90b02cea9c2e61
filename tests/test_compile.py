"""torch.compile and torch.export: one graph, few compilations, the same numbers."""

import io
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.generation import CompileConfig

from gptq_triton import QuantizeConfig, QuantLinear, quantize_model
from gptq_triton.integrations.peft import register
from tests.strategies import random_weight
from tests.tiny import VOCABULARY, batches, tiny

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler on the CPU"
)
LENGTHS = range(3, 23)  # 20 of them; 0 and 1 are special to torch.compile, whatever runs


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantized(name="llama", config=None, **overrides):
    model = tiny(name, **overrides)
    quantize_model(model, batches(2), config or QuantizeConfig(4, 32), method="rtn", progress=False)
    return model


def layer(bits, act_order, bias):
    weight = random_weight(96, 64, bits, 32, act_order=act_order, scale_dtype=torch.float32)
    return QuantLinear.from_packed(weight, torch.ones(64) if bias else None)


def counting(backend, run, **options):
    counter = CompileCounterWithBackend(backend)
    return counter, torch.compile(run, backend=counter, fullgraph=True, **options)


def tokens(length):
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize(
    ("bits", "act_order", "bias"), [(2, False, True), (3, True, False), (4, True, True), (8, False, False)]
)
def test_a_layer_forward_and_backward(bits, act_order, bias):
    model = nn.Sequential(layer(bits, act_order, bias), nn.GELU())
    counter, compiled = counting("aot_eager", model)
    for length in LENGTHS:
        x = torch.randn(length, 96, requires_grad=True)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        expected = model(x)
        (dx_expected,) = torch.autograd.grad(expected.square().sum(), x)
        assert (y - expected).norm() <= 1e-6 * expected.norm()
        assert (dx - dx_expected).norm() <= 1e-6 * dx_expected.norm()
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt"])
def test_a_model_at_twenty_lengths(name):
    model = quantized(name, QuantizeConfig(3, 32, sym=False, desc_act=name == "llama"))
    assert torch._dynamo.explain(model)(tokens(7), use_cache=False).graph_break_count == 0
    torch._dynamo.reset()
    counter, compiled = counting("aot_eager", model)
    with torch.no_grad():
        for length in LENGTHS:
            found = compiled(tokens(length), use_cache=False).logits
            expected = model(tokens(length), use_cache=False).logits
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counter.frame_count <= 2


@needs_compiler
def test_inductor():
    model = quantized(num_hidden_layers=1)
    counter, compiled = counting("inductor", model)
    with torch.no_grad():
        for length in (5, *LENGTHS):
            found = compiled(tokens(length), use_cache=False).logits
            expected = model(tokens(length), use_cache=False).logits
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert counter.frame_count <= 2


def test_adapters():
    model = quantized(num_hidden_layers=1)
    config = register(LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False), model)
    model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(x):
        return model(x, labels=x, use_cache=False).loss

    counter, compiled = counting("aot_eager", loss)
    for length in LENGTHS:
        found = torch.autograd.grad(compiled(tokens(length)), trained)
        expected = torch.autograd.grad(loss(tokens(length)), trained)
        off = sum((a - b).square().sum() for a, b in zip(found, expected, strict=True))
        assert off.sqrt() <= 1e-4 * sum(b.square().sum() for b in expected).sqrt()
    assert counter.frame_count <= 2


def test_generate_with_a_static_cache():
    model = quantized()
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(tokens(8), **greedy)
    counter = CompileCounterWithBackend("aot_eager")
    # a function, because the config is copied deeply
    how = CompileConfig(backend=lambda *args: counter(*args), mode=None, fullgraph=True, dynamic=False)
    how._compile_all_devices = True  # transformers compiles by itself on accelerators only
    assert torch.equal(model.generate(tokens(8), **greedy, compile_config=how), expected)
    assert 1 <= counter.frame_count <= 2


@pytest.mark.parametrize("act_order", [False, True])
def test_export(act_order):
    model = nn.Sequential(layer(4, act_order, bias=True), nn.GELU())
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (torch.randn(5, 96),), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (2, 7, 64):
        x = torch.randn(length, 96)
        assert torch.equal(loaded(x), model(x))
    assert any("gptq_triton.matmul" in str(node.target) for node in program.graph.nodes)


@needs_compiler
def test_ahead_of_time(tmp_path):
    model = nn.Sequential(layer(4, True, bias=True), nn.GELU())
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (torch.randn(5, 96),), dynamic_shapes=({0: rows},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for length in (2, 64):
        x = torch.randn(length, 96)
        assert (compiled(x) - model(x)).norm() <= 1e-6 * model(x).norm()


def test_export_of_a_model():
    model = quantized()
    length = torch.export.Dim("length", min=2, max=64)
    options = {"use_cache": False}
    shapes = {"input_ids": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": tokens(5), **options}, dynamic_shapes=shapes)
    with torch.no_grad():
        for n in (3, 40):
            found = program.module()(input_ids=tokens(n), **options).logits
            expected = model(tokens(n), use_cache=False).logits
            assert (found - expected).norm() <= 1e-5 * expected.norm()
