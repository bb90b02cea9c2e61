"""quantize and Quantizer: bit for bit what the vectors say, and what they mend."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton.quantizer import Quantizer, quantize
from tests.vectors import CASES, SHAPES, load

FLAGS = sorted({name.rsplit("_", 1)[0] for name in SHAPES})


@pytest.mark.parametrize("flags", FLAGS)
def test_shapes_and_flags_match_the_original_bit_for_bit(flags):
    option = {part[0]: int(part[1:]) for part in flags.split("_")}
    x = torch.from_numpy(SHAPES[flags + "_x"])
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=bool(option["p"]), sym=bool(option["s"]), mse=bool(option["m"]))
    quantizer.find_params(x, weight=bool(option["w"]))
    for name, got in (("scale", quantizer.scale), ("zero", quantizer.zero), ("q", quantizer.quantize(x))):
        np.testing.assert_array_equal(got.numpy(), SHAPES[f"{flags}_{name}"], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_group_parameters_match_the_original_bit_for_bit(case):
    data = load(case)
    weight = data["weight"].float()
    rows = weight.shape[1] // data["scales_nk"].shape[1]
    for group in range(data["scales_nk"].shape[1]):
        quantizer = Quantizer()
        quantizer.configure(data["bits"], perchannel=True, sym=data["sym"], mse=data["mse"])
        quantizer.find_params(weight[:, group * rows : (group + 1) * rows], weight=True)
        assert torch.equal(quantizer.scale[:, 0], data["scales_nk"][:, group])
        assert torch.equal(quantizer.zero[:, 0], data["zeros_nk"][:, group])


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    shift=st.sampled_from([-3.0, 0.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_error_is_at_most_half_a_step_inside_the_range(bits, sym, shift, seed):
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) + shift
    quantizer = Quantizer()
    quantizer.configure(bits, perchannel=True, sym=sym)
    quantizer.find_params(x, weight=True)
    # the asymmetric zero point is rounded, and the middle code of a symmetric grid is off centre by
    # half a step: each can cut another half step from one end
    assert ((quantizer.quantize(x) - x).abs() <= quantizer.scale * (1 + 1e-5)).all()


def test_symmetric_rows_without_negatives_are_not_clipped():  # trap 5
    x = torch.linspace(0.1, 1, 64)[None]
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=True, sym=True)
    quantizer.find_params(x, weight=True)
    assert float((quantizer.quantize(x) - x).abs().max()) <= float(quantizer.scale)


def test_scale_never_underflows():  # trap 6
    x = torch.full((1, 8), 1e-44)
    quantizer = Quantizer()
    quantizer.configure(8, perchannel=True, sym=False)
    quantizer.find_params(x, weight=True)
    assert float(quantizer.scale) >= torch.finfo(torch.float32).tiny
    assert torch.isfinite(quantizer.quantize(x)).all()


def test_arguments_are_left_alone():  # trap 7
    x = torch.randn(4, 8)
    before = x.clone()
    quantizer = Quantizer()
    quantizer.configure(4, sym=True, mse=True)
    quantizer.find_params(x, weight=True)
    quantizer.quantize(x)
    assert torch.equal(x, before)


def test_half_precision_is_measured_in_float32():
    x = torch.tensor([[-60000.0, 60000.0]], dtype=torch.float16)  # the range overflows float16
    quantizer = Quantizer()
    quantizer.configure(4, perchannel=True, sym=False)
    quantizer.find_params(x, weight=True)
    assert quantizer.scale.dtype == torch.float32
    assert float(quantizer.scale) == pytest.approx(120000 / 15, rel=1e-3)


def test_state_before_and_after():
    quantizer = Quantizer()
    assert not quantizer.enabled()
    assert not quantizer.ready()
    x = torch.randn(3)
    assert quantizer.quantize(x) is x
    with pytest.raises(ValueError, match="configure"):
        quantizer.find_params(x)
    quantizer.configure(4)
    quantizer.find_params(x)
    assert quantizer.enabled()
    assert quantizer.ready()


def test_refusals():
    quantizer = Quantizer()
    with pytest.raises(ValueError, match="bits must be one of"):
        quantizer.configure(5)
    with pytest.raises(ValueError, match="grid"):
        quantizer.configure(4, grid=0)
    quantizer.configure(4)
    with pytest.raises(ValueError, match="empty"):
        quantizer.find_params(torch.empty(0, 3))
    with pytest.raises(ValueError, match="finite"):
        quantizer.find_params(torch.tensor([float("nan")]))


def test_quantize_is_the_seed_function():
    x = torch.tensor([-1.0, -0.4, 0.0, 0.26, 9.0])
    got = quantize(x, torch.tensor(0.5), torch.tensor(2.0), torch.tensor(3))
    assert got.tolist() == [-1.0, -0.5, 0.0, 0.5, 0.5]
