"""From dialect to dialect: bit for bit back, nothing lost, nothing half-written, little in memory."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_triton import (
    QuantizeConfig,
    convert_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_model,
    save_quantized,
)
from gptq_triton import conversion as conversion_module
from gptq_triton.spec import BITS
from gptq_triton.tensorfile import TensorFile
from gptq_triton.zeros import decode_zeros
from tests.test_traps import as_autogptq, by_field, by_word, rewrite, same, weights
from tests.tiny import batches, tiny, tokenizer
from tests.vectors import CASES, load

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def make(folder, config=None, **options):
    model = tiny("llama")
    quantize_model(model, batches(2), config or QuantizeConfig(4, 32, sym=False), method="rtn", progress=False)
    save_quantized(model, folder, tokenizer(), **options)
    return folder


def tensors(folder):
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_there_and_back_is_bit_exact(tmp_path, bits, sym):
    """Random weights have no zero point of 0, so that v1 can hold them."""
    source = make(tmp_path / "m", QuantizeConfig(bits, 32, sym=sym, checkpoint_format="gptq_v2"))
    done = convert_checkpoint(source, tmp_path / "v1", "v1")
    assert (done.out, done.layers, done.changed, done.repaired) == (str(tmp_path / "v1"), 14, 14, [])
    assert convert_checkpoint(tmp_path / "v1", tmp_path / "v2", "v2").changed == 14
    assert convert_checkpoint(tmp_path / "v2", tmp_path / "same", "v2").changed == 0
    assert same(tensors(tmp_path / "v2"), tensors(source))
    assert same(tensors(tmp_path / "same"), tensors(source))
    middle = tensors(tmp_path / "v1")
    changed = [key for key, tensor in tensors(source).items() if not torch.equal(tensor, middle[key])]
    assert {key.rpartition(".")[2] for key in changed} == {"qzeros"}
    assert same(weights(load_quantized(tmp_path / "v1")), weights(load_quantized(source)))
    for name in ("config.json", "quantize_config.json", "tokenizer.json", "generation_config.json"):
        assert json.loads((tmp_path / "v2" / name).read_text()) == json.loads((source / name).read_text())


def test_whole_words_to_fields_and_on(tmp_path):
    """From what GPTQModel borrows: to v2 and, where no zero point is 0, to v1."""
    source = make(tmp_path / "m")
    expected = weights(load_quantized(source))
    rewrite(source, by_word, checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5"]}, format="gptq")
    convert_checkpoint(source, tmp_path / "v2", "v2")
    assert same(weights(load_quantized(tmp_path / "v2")), expected)
    fields = json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]
    assert (fields["checkpoint_format"], fields["format"]) == ("gptq_v2", "gptq_v2")
    convert_checkpoint(source, tmp_path / "v1", "v1")
    assert same(weights(load_quantized(tmp_path / "v1")), expected)


def test_shards_stay_and_their_index(tmp_path):
    source = make(tmp_path / "m", max_shard_size="64KB")
    convert_checkpoint(source, tmp_path / "out", "v1")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in source.iterdir())
    index, old = (json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "out", source))
    assert index["weight_map"] == old["weight_map"]
    assert same(weights(load_quantized(tmp_path / "out")), weights(load_quantized(source)))


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    source = make(tmp_path / "m")
    real, alive = TensorFile.read, []

    def read(self, name):
        alive.append(name)
        return real(self, name)

    monkeypatch.setattr(TensorFile, "read", read)
    written = []
    real_write = conversion_module.write_tensors

    def write(path, entries, items, metadata):
        def counted():
            for name, tensor in items:
                assert not written or alive[-1] == name  # read just now, not all of them ahead
                written.append(name)
                yield name, tensor

        real_write(path, entries, counted(), metadata)

    monkeypatch.setattr(conversion_module, "write_tensors", write)
    convert_checkpoint(source, tmp_path / "out", "v1")
    assert set(written) == tensors(source).keys()


def test_a_zero_point_of_0_keeps_a_checkpoint_from_v1(tmp_path):
    source = make(tmp_path / "m")
    rewrite(source, lambda words: words & ~0xF)
    with pytest.raises(
        ValueError, match=r"v1 has no agreed way to store a zero point of 0, which 14 layers have: model\."
    ):
        convert_checkpoint(source, tmp_path / "out", "v1")
    assert not (tmp_path / "out").exists()
    expected = weights(load_quantized(source))
    rewrite(source, by_field, checkpoint_format="gptq")
    with pytest.raises(ValueError, match=r"zero points may be read in two ways: 14 layers"):
        convert_checkpoint(source, tmp_path / "out", "v2")
    convert_checkpoint(source, tmp_path / "out", "v2", zero_points="v1")  # the user knows
    assert same(weights(load_quantized(tmp_path / "out")), expected)


def test_what_is_lost_is_refused(tmp_path):
    source = make(tmp_path / "m")
    rewrite(source, lambda words: as_autogptq(words & ~0xF), checkpoint_format="gptq")
    with pytest.raises(ValueError, match=r"information is lost already: 14 layers \(model\.layers"):
        convert_checkpoint(source, tmp_path / "out", "v2", repair=True)


def test_a_wrong_label_needs_no_repair_and_wrong_widths_do(tmp_path):
    source = make(tmp_path / "m", QuantizeConfig(4, 32))
    expected = weights(load_quantized(source))
    rewrite(source, lambda words: words, checkpoint_format="gptq_v2")
    assert len(convert_checkpoint(source, tmp_path / "out", "v1").repaired) == 14
    assert not inspect_checkpoint(tmp_path / "out").findings
    rewrite(source, lambda words: words, bits=8, group_size=64)
    with pytest.raises(ValueError, match=r"needs repair, which was not asked for: 28 layers .* the config says 8 bits"):
        convert_checkpoint(source, tmp_path / "out", "v1")
    done = convert_checkpoint(source, tmp_path / "out", "v1", repair=True)
    assert len(done.repaired) == 42
    assert not inspect_checkpoint(tmp_path / "out").findings
    assert same(weights(load_quantized(tmp_path / "out")), expected)


def test_an_unset_g_idx_is_dropped(tmp_path):
    source = make(tmp_path / "m")
    expected = weights(load_quantized(source))
    content = load_file(source / WEIGHTS)
    save_file({k: t * 0 if k.endswith("g_idx") else t for k, t in content.items()}, source / WEIGHTS)
    assert same(weights(load_quantized(source)), expected)
    convert_checkpoint(source, tmp_path / "out", "v2", repair=True)
    assert not any(key.endswith("g_idx") for key in tensors(tmp_path / "out"))
    assert same(weights(load_quantized(tmp_path / "out")), expected)
    assert not inspect_checkpoint(tmp_path / "out").findings


@pytest.mark.parametrize("with_config", ["config.json", "quantize_config.json"])
def test_repair_writes_both_config_files(tmp_path, with_config):
    source = make(tmp_path / "m")
    other = {"config.json": "quantize_config.json", "quantize_config.json": "config.json"}[with_config]
    content = json.loads((source / other).read_text())
    content.pop("quantization_config", None)
    (source / other).write_text(json.dumps(content if other == "config.json" else {}))
    convert_checkpoint(source, tmp_path / "out", "v2")
    assert "bits" not in json.loads((tmp_path / "out" / "quantize_config.json").read_text()) or other == "config.json"
    assert [f.kind for f in inspect_checkpoint(source).findings] == ["config"]
    done = convert_checkpoint(source, tmp_path / "out", "v2", repair=True)
    assert [f.kind for f in done.repaired] == ["config"]
    assert not inspect_checkpoint(tmp_path / "out").findings
    (source / "quantize_config.json").unlink()
    if with_config == "config.json":
        convert_checkpoint(source, tmp_path / "out", "v2", repair=True)
        assert not inspect_checkpoint(tmp_path / "out").findings


@pytest.mark.parametrize("files", [1, 3])
def test_torch_files_become_safetensors(tmp_path, files, caplog):
    source = make(tmp_path / "m")
    expected, content = weights(load_quantized(source)), load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    names = sorted(content)
    if files == 1:
        torch.save(content, source / "gptq_model-4bit-32g.bin")
    else:
        where = {}
        for index in range(files):
            own = {name: content[name] for name in names[index::files]}
            torch.save(own, source / f"pytorch_model-{index}.bin")
            where |= dict.fromkeys(own, f"pytorch_model-{index}.bin")
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    with caplog.at_level(logging.WARNING):
        assert same(weights(load_quantized(source)), expected)
    assert not caplog.records
    convert_checkpoint(source, tmp_path / "out", "v1")
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert (tmp_path / "out" / INDEX).exists() == (files > 1)
    assert same(weights(load_quantized(tmp_path / "out")), expected)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("case", CASES)
def test_single_files_of_old_writers(tmp_path, case, suffix):
    data = load(case)
    state = {f"layers.0.proj.{key}": data[key] for key in ("qweight", "qzeros", "scales", "bias") if key in data}
    state["norm.weight"] = torch.ones(3)
    path = tmp_path / f"old.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    found = inspect_checkpoint(path)
    assert [(e.bits, e.in_features, e.out_features) for e in found.layers] == [(data["bits"], 256, 256)]
    assert found.layers[0].group_size in (data["group_size"], 256)
    out = tmp_path / "new.safetensors"
    convert_checkpoint(path, out, "v2")
    new = load_file(out)
    zeros = decode_zeros(new["layers.0.proj.qzeros"], data["bits"], 256, "v2")
    assert torch.equal(zeros.float(), data["zeros_nk"].t())
    assert inspect_checkpoint(out).layers[0].dialect == "v2"  # its metadata says so
    convert_checkpoint(out, tmp_path / "back.safetensors", "v1")
    assert same(load_file(tmp_path / "back.safetensors"), state)


def test_targets(tmp_path):
    source = make(tmp_path / "m")
    with pytest.raises(ValueError, match="to must be one of"):
        convert_checkpoint(source, tmp_path / "out", "v3")
    with pytest.raises(ValueError, match="holds the source and would be replaced"):
        convert_checkpoint(source, source, "v1")
    with pytest.raises(ValueError, match=r"out must be a \.safetensors file"):
        convert_checkpoint(source / WEIGHTS, tmp_path / "out", "v1")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not a model folder; it is left alone"):
        convert_checkpoint(source, tmp_path / "thesis", "v1")
    shutil.copytree(source, tmp_path / "broken")
    content = load_file(source / WEIGHTS)
    content.pop("model.layers.0.mlp.up_proj.scales")
    save_file(content, tmp_path / "broken" / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.layers\.0\.mlp\.up_proj: scales is missing"):
        convert_checkpoint(tmp_path / "broken", tmp_path / "out", "v1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "m", "thesis"]
