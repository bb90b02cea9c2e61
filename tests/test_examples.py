"""The scripts of examples/, on tiny models."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gptq_triton import QuantizeConfig, load_quantized, quantize_model, save_quantized
from tests.tiny import batches, save_tiny, text, tiny, tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_quantize_and_finetune(run, tmp_path):
    model, words = save_tiny(tmp_path / "model"), tmp_path / "text.txt"
    words.write_text("\n\n".join(text(64, seed) for seed in range(6)))
    quantized, adapter = tmp_path / "quantized", tmp_path / "adapter"
    said = run("quantize_on_load.py", model, words, quantized, "--group-size", 32)
    assert text(64, 0)[:20] in said
    assert "0.1 MB" in said
    assert AutoTokenizer.from_pretrained(quantized).vocab_size == AutoTokenizer.from_pretrained(model).vocab_size
    for dora in ([], ["--dora"]):
        said = run("finetune_lora.py", quantized, words, adapter, "--length", 64, "--steps", 60, "--rank", 4, *dora)
        first, last = said.splitlines()[-1].removeprefix("loss ").split(" -> ")
        assert float(last) < 0.9 * float(first)
        assert (adapter / "adapter_model.safetensors").exists()


def test_tensor_parallel(tmp_path):
    model = tiny("llama")
    quantize_model(model, batches(2), QuantizeConfig(4, 32), method="rtn", progress=False)
    save_quantized(model, tmp_path / "model", tokenizer())
    # standalone: a port of its own
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, EXAMPLES / "tensor_parallel.py", tmp_path / "model", "w1 w2 w3", "--tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    prompt = tokenizer()("w1 w2 w3", return_tensors="pt")
    expected = load_quantized(tmp_path / "model", "cpu").generate(**prompt, max_new_tokens=5, do_sample=False)
    assert done.stdout.strip() == tokenizer().decode(expected[0])
