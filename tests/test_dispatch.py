"""dispatch.choose is a pure function: no GPU, no tensors."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton.dispatch import Plan, choose
from gptq_triton.spec import BITS, QuantSpec

KERNELS = Path(__file__).parent.parent / "kernels"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")

sizes = st.integers(1, 2**20)
specs = st.builds(
    QuantSpec,
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((-1, 1, 8, 16, 32, 48, 64, 100, 128, 256)),
    desc_act=st.booleans(),
)


@given(st.integers(0, 2**20), sizes, sizes, specs, st.sampled_from(DTYPES), st.sampled_from(ARCHS), st.booleans())
def test_every_plan_can_be_launched(M, N, K, spec, dtype, arch, transposed):
    plan = choose(M, N, K, spec, dtype, arch, transposed=transposed)
    assert (KERNELS / f"{plan.kernel}.py").exists()
    for block in (plan.block_m, plan.block_n, plan.block_k):
        assert block >= 16
        assert block & (block - 1) == 0
    assert plan.num_warps in (1, 2, 4, 8)
    assert plan.num_stages >= 1
    assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan


@given(st.integers(1, 5000), specs, st.sampled_from(DTYPES), st.booleans())
def test_tiles_stay_inside_a_group_where_they_can(M, spec, dtype, transposed):
    K = 4096
    rows = spec.rows_per_group(K)
    plan = choose(M, 4096, K, spec, dtype, "sm_90", transposed=transposed)
    if not spec.desc_act and rows % 16 == 0:
        assert rows == K or rows % plan.block_k == 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_take_small_tiles(dtype, transposed):
    tiles = [choose(M, 4096, 4096, QuantSpec(4), dtype, "sm_90", transposed=transposed).block_m for M in (1, 16, 17)]
    assert tiles[0] == tiles[1] == 16
    assert tiles[2] > 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn])
def test_a_dtype_without_a_kernel_is_refused(dtype):
    with pytest.raises(TypeError, match="dtype must be float16, bfloat16 or float32"):
        choose(1, 64, 64, QuantSpec(4), dtype, "sm_90")
