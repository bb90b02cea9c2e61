"""Calibration shared by two processes: what comes out is what one process gives, bit for bit."""

import socket
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing import spawn

from gptq_triton import QuantizeConfig, quantize_model, streaming
from gptq_triton.hessian import Hessian
from gptq_triton.ranks import PARTS, Ranks
from tests import test_experts as moe
from tests.tiny import batches, tiny

CONFIGS = {
    "llama": QuantizeConfig(4, 32, sym=False, true_sequential=True),
    "mistral": QuantizeConfig(3, 32, desc_act=True, feedback=0.5, lm_head=True),
    "qwen3_moe": QuantizeConfig(4, 32),
}


def quantized(name, folder, group=None):
    """State dict and reports of a model; batches are not joined, so that there are enough."""
    before, streaming.BATCH_TOKENS = streaming.BATCH_TOKENS, 1
    try:
        model = moe.tiny(moe.FAMILIES[name]) if name in moe.FAMILIES else tiny(name)
        samples = moe.batches() if name in moe.FAMILIES else batches(5)
        workdir = folder / f"{name}-{0 if group is None else dist.get_world_size(group)}"
        reports = quantize_model(model, samples, CONFIGS[name], progress=False, group=group, workdir=workdir)
    finally:
        streaming.BATCH_TOKENS = before
    return model.state_dict(), [(r.name, r.method, r.tokens, r.error) for r in reports]


def run(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    found = {name: quantized(name, folder, dist.group.WORLD) for name in CONFIGS}
    with pytest.raises(ValueError, match="calibration must be 2 batches"):
        quantize_model(tiny("llama"), batches(1), group=dist.group.WORLD)
    broken = tiny("llama")
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan  # one process finds it
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the weight must be finite"):
        quantize_model(broken, batches(1) + batches(1, 16), CONFIGS["llama"], progress=False, group=dist.group.WORLD)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_give_what_one_gives(name, found, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected, reports = quantized(name, tmp_path)
    finally:
        torch.set_num_threads(threads)
    for state, theirs in (each[name] for each in found):
        assert theirs == reports
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(state[key], tensor), key


@given(count=st.integers(0, 40), size=st.sampled_from([1, 2, 4, 8]))
def test_every_batch_is_run_once_and_sums_do_not_depend_on_the_processes(count, size):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    alone = Ranks(count)
    assert [i for part in alone.parts for i in part] == list(range(count)) == list(alone.batches)
    assert len(alone.parts) == PARTS

    def part_sums(parts):
        for part in parts:
            hessian = Hessian(1)
            for i in part:
                hessian.sum += values[i]
            yield {"a": hessian}

    whole = alone.total(part_sums(alone.parts))["a"].sum
    own = PARTS // size
    branches = []
    for rank in range(size):
        share = Ranks(count)
        share.parts = alone.parts[rank * own : (rank + 1) * own]
        branches.append(share.total(part_sums(share.parts))["a"].sum)
    while len(branches) > 1:
        branches = [a + b for a, b in zip(branches[::2], branches[1::2], strict=True)]
    assert torch.equal(branches[0], whole)


@given(costs=st.lists(st.floats(0.1, 9), max_size=12), size=st.sampled_from((2, 4, 8)))
def test_no_process_has_much_more_to_solve_than_others(costs, size):
    with (
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "get_world_size", return_value=size),
    ):
        owners = Ranks(64, mock.sentinel.group).owners(costs)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert sum(loads) == pytest.approx(sum(costs))
    assert max(loads) <= sum(costs) / size + max(costs, default=0)
    assert Ranks(64).owners(costs) == [0] * len(costs)
