"""Kernels in Triton's interpreter, on CPU tensors: `TRITON_INTERPRET=1 pytest -m interpreter`."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_triton.spec import BITS
from tests.strategies import (
    FORMATS,
    assert_close,
    exact_rows,
    oracle,
    poisoned,
    poisoned_weight,
    random_rows,
    random_weight,
    weights,
)

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 from the start"),
    pytest.mark.skipif(sys.platform != "linux", reason="triton is on Linux only"),
]

DTYPES = (torch.float16, torch.float32)  # the interpreter multiplies bfloat16 wrongly
BLOCKS = st.fixed_dictionaries(
    {
        "block_m": st.just(16),
        "block_n": st.sampled_from((16, 32)),
        "block_k": st.sampled_from((16, 32, 64)),
    }
)
QUICK = settings(deadline=None, max_examples=60)


def launch(x, weight, bias=None, *, transposed=False, block_m=16, block_n=32, block_k=32):
    """The kernel's answer, written over NaN, with garbage around every input."""
    from gptq_triton.kernels.matmul import matmul
    from gptq_triton.kernels.matmul_transposed import matmul_transposed

    out = poisoned(torch.full((x.shape[0], weight.K if transposed else weight.N), float("nan"), dtype=x.dtype))
    parts = poisoned_weight(weight)
    options = {
        "bits": weight.spec.bits,
        "zero_offset": weight.zero_offset,
        "rows_per_group": weight.spec.rows_per_group(weight.K),
        "block_m": block_m,
        "block_n": block_n,
        "block_k": block_k,
        "num_warps": 4,
        "num_stages": 2,
    }
    head = (poisoned(x), parts.qweight, parts.scales, parts.qzeros, parts.g_idx)
    if transposed:
        matmul_transposed(*head, out, **options)
    else:
        matmul(*head, bias, out, **options)
    return out


@QUICK
@given(
    weights(max_k=150, max_n=70),
    st.integers(1, 35),
    st.sampled_from(DTYPES),
    st.booleans(),
    BLOCKS,
)
def test_matmul_is_within_the_bound(weight, M, dtype, with_bias, blocks):
    x = random_rows(M, weight.K, dtype)
    bias = random_rows(1, weight.N, dtype, seed=1)[0] if with_bias else None
    assert_close(launch(x, weight, bias, **blocks), x, weight, bias)


@QUICK
@given(weights(max_k=100, max_n=100), st.integers(1, 35), st.sampled_from(DTYPES), BLOCKS)
def test_matmul_transposed_is_within_the_bound(weight, M, dtype, blocks):
    dy = random_rows(M, weight.N, dtype)
    assert_close(launch(dy, weight, transposed=True, **blocks), dy, weight, transposed=True)


@QUICK
@given(weights(exact=True), st.integers(1, 20), st.sampled_from(DTYPES), st.booleans(), BLOCKS)
def test_exact_data_gives_the_exact_answer(weight, M, dtype, transposed, blocks):
    x = exact_rows(M, weight.N if transposed else weight.K, dtype)
    expected = oracle(x, weight, transposed=transposed).to(dtype)
    assert torch.equal(launch(x, weight, transposed=transposed, **blocks), expected)


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("bits", BITS)
def test_every_code_and_zero_point_is_decoded(bits, checkpoint_format):
    # x = I: y is the weight itself; 33 rows and columns reach into a second run of every width
    weight = random_weight(65, 65, bits, 8, exact=True, checkpoint_format=checkpoint_format)
    eye = torch.eye(65)
    assert torch.equal(launch(eye, weight), oracle(eye, weight).float())
    assert torch.equal(launch(eye, weight, transposed=True), oracle(eye, weight, transposed=True).float())


def test_rows_do_not_depend_on_their_neighbours():
    weight = random_weight(96, 40, 4, 32)
    x = random_rows(20, 96, torch.float16)
    assert torch.equal(launch(x, weight)[:3], launch(x[:3], weight))
