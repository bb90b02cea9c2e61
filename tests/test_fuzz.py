"""Damaged checkpoints: a clear error or the values that the bytes mean, nothing else, and soon.

A few hundred of them in every run; ``pytest tests/test_fuzz.py --hypothesis-profile=deep`` takes 20,000.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_triton import load_quantized
from tests import fuzzing

CASES = 300  # in a profile that asks for fewer


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    home = tmp_path_factory.mktemp("bases")
    fuzzing.make_bases(home)
    return home


def test_damaged_checkpoints(bases):
    @settings(max_examples=max(CASES, settings.get_profile(settings.get_current_profile_name()).max_examples))
    @given(seed=st.integers(0, 2**64 - 1))
    def case(seed):
        fuzzing.run_case(bases, seed, bases / "scratch" / "m")

    case()


@pytest.mark.parametrize("name", fuzzing.CONFIGS)
def test_the_oracle_and_the_reader_agree_on_whole_checkpoints(bases, name):
    expected = fuzzing.meaning(bases / name)
    fuzzing.check(load_quantized(bases / name, device="cpu"), expected)
    assert all(np.isfinite(weight).all() and weight.std() > 0 for weight in expected.values())


def test_the_fuzzer_sees_a_silent_difference(bases, monkeypatch):
    """A reader that ignores what GPTQModel subtracts from whole words."""
    from gptq_triton import findings

    monkeypatch.setattr(findings, "_writer_is_gptqmodel", lambda config: False)
    model = load_quantized(bases / "words", device="cpu")
    with pytest.raises(AssertionError, match="differs"):
        fuzzing.check(model, fuzzing.meaning(bases / "words"))


def test_the_bases_hold_zero_points_of_0(bases):
    config = json.loads((bases / "words" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq"
    model = load_quantized(bases / "words", device="cpu")
    zeros = [layer.qzeros for layer in model.modules() if hasattr(layer, "qzeros")]
    assert any(bool(((words & 0xF) == 0).any()) for words in zeros)
    assert all(words.dtype == torch.int32 for words in zeros)
