"""transformers, PEFT, torch.compile and tensor parallel on GPUs: what the CPU tests show, with kernels and graphs."""

import copy
import socket

import pytest
import torch
import torch.multiprocessing as processes
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import gptq_triton.integrations.transformers  # noqa: F401
from gptq_triton import QuantizeConfig, load_quantized, quantize_model, save_quantized
from gptq_triton.integrations.generation import GraphedDecoding
from gptq_triton.integrations.peft import register
from tests import parallel
from tests.tiny import VOCABULARY, batches, tiny

pytestmark = pytest.mark.gpu

# large enough for half-precision tensor cores, small enough for seconds
WIDE = {"hidden_size": 256, "intermediate_size": 2048, "head_dim": 64}
FORMS = {
    "sym": QuantizeConfig(4, 128),
    "asym": QuantizeConfig(3, 64, sym=False),
    "act_order": QuantizeConfig(4, 128, sym=False, desc_act=True),
}
GREEDY = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}


MORE = {
    "eight_bits": QuantizeConfig(8, -1, sym=False, checkpoint_format="gptq"),
    "two_bits": QuantizeConfig(2, 32, sym=False, lm_head=True),
}


def saved(parent, forms):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    for name, config in forms.items():
        model = tiny("llama", **WIDE)
        quantize_model(model, batches(2), config, device="cuda", progress=False)
        save_quantized(model, parent / name)
    return parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("gpu"), FORMS)


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", **options)


def tokens(length):
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length)).cuda()


@torch.no_grad()
def logits(model, length=20):
    return model(tokens(length).to(model.device)).logits.float().cpu()


@torch.no_grad()
def assert_greedy(model, prompt, ids):
    """Every token made is the likeliest under the model but for rounding: halves may turn near ties."""
    start = prompt.shape[1]
    assert torch.equal(ids[:, :start], prompt)
    scores = model(ids).logits[:, start - 1 : -1].float()
    short = scores.amax(2) - scores.gather(2, ids[:, start:, None])[:, :, 0]
    assert bool((short <= 0.01 * scores.norm(dim=2)).all())


def test_blocks_may_come_from_the_host():
    found = []
    for home in ("cpu", "cuda"):
        model = tiny("llama", **WIDE, num_hidden_layers=4)
        model.model.layers.to(home)  # and embeddings, which round otherwise on a GPU, on the CPU
        quantize_model(model, batches(8), QuantizeConfig(4, 32), device="cuda", progress=False)
        state = model.model.layers.state_dict()
        assert {tensor.device.type for tensor in state.values()} == {home}
        found.append({key: value.cpu() for key, value in state.items()})
    assert len(found[0]) == len(found[1]) > 28
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("name", FORMS)
def test_load_generate_save(name, folders, tmp_path):
    model, reference = load(folders / name, dtype=torch.float16), load_quantized(folders / name, "cpu")
    expected = logits(reference)
    assert (logits(model) - expected).norm() <= 0.01 * expected.norm()
    footprint = model.get_memory_footprint()
    assert footprint <= 1.1 * reference.get_memory_footprint()
    for how in ({}, {"cache_implementation": "static"}):  # the second is compiled, and rounds otherwise
        ids = model.generate(tokens(8), **GREEDY, **how)
        assert ids.shape == (1, 8 + GREEDY["max_new_tokens"])
        assert_greedy(model, tokens(8), ids)
    model.save_pretrained(tmp_path / "again")
    again = load_quantized(tmp_path / "again", "cpu").state_dict()
    for key, tensor in reference.state_dict().items():
        if key.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"):
            assert torch.equal(again[key], tensor), key
    floats = load(folders / name, dtype=torch.float32).dequantize()
    assert (logits(floats) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", FORMS)
def test_generation_in_graphs(name, folders):
    model, graphed = load(folders / name, dtype=torch.float32), GraphedDecoding()
    for length, new in ((8, 16), (30, 40), (8, 1), (90, 300)):  # the last needs a longer cache
        greedy, prompt = GREEDY | {"max_new_tokens": new}, tokens(length)
        expected = model.generate(prompt, **greedy)
        assert torch.equal(model.generate(prompt, **greedy, custom_generate=graphed), expected)
    rows = torch.cat([tokens(8), tokens(8) + 1])
    end = model.generate(rows, **GREEDY)[0, 12].item()
    greedy = GREEDY | {"eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(model.generate(rows, **greedy, custom_generate=graphed), model.generate(rows, **greedy))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", FORMS)
def test_compile(name, mode, folders):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = load(folders / name, dtype=torch.bfloat16)
    logits(model)  # the first forward pass may put weights into the form that kernels take
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for length in range(3, 23):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(tokens(length), use_cache=False).logits.float()
            expected = model(tokens(length), use_cache=False).logits.float()
            assert (found - expected).norm() <= 0.03 * expected.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_adapters(name, dora, folders):
    config = LoraConfig(r=8, target_modules="all-linear", use_dora=dora, init_lora_weights=False)

    def gradients(model):
        torch.manual_seed(0)
        model = get_peft_model(model, register(copy.deepcopy(config), model))
        start = {key: value.cpu() for key, value in model.state_dict().items() if "lora_" in key}
        x = tokens(20).to(model.device)
        model(x, labels=x).loss.backward()
        return start, {key: p.grad.double().cpu() for key, p in model.named_parameters() if p.requires_grad}

    start, exact = gradients(load_quantized(folders / name, "cpu"))
    own, found = gradients(load(folders / name, dtype=torch.float32))
    assert all((own[key] - start[key]).abs().max() <= 1e-3 * start[key].abs().max() for key in start)
    off = sum((found[key] - exact[key]).square().sum() for key in exact)
    assert off.sqrt() <= 0.01 * sum(exact[key].square().sum() for key in exact).sqrt()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_two_gpus(folders):
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    model = AutoModelForCausalLM.from_pretrained(folders / "asym", device_map=places, dtype=torch.float16)
    expected = logits(load(folders / "asym", dtype=torch.float16))
    assert (logits(model) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel_with_nccl(tmp_path):
    folders, out = saved(tmp_path / "models", FORMS | MORE), tmp_path / "out"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes.start_processes(parallel.run_on_gpus, (folders, out, port), nprocs=2, start_method="spawn")
    for rank in range(2):
        found = torch.load(out / f"{rank}.pt", weights_only=False)
        for name in FORMS | MORE:
            whole = load(folders / name)
            prompt = parallel.prompt(whole).cuda()
            with torch.no_grad():
                expected = whole(prompt).logits.float().cpu()
            assert (found[name]["logits"].float().cpu() - expected).norm() <= 0.01 * expected.norm()
            for way in ("tokens", "graphed"):
                assert found[name][way].shape == (len(prompt), prompt.shape[1] + parallel.GREEDY["max_new_tokens"])
                assert_greedy(whole, prompt, found[name][way].cuda())
            assert found[name]["held"] <= 0.55 * parallel.held(whole)
