"""Cutting quantized weights: a part is exactly that part of the whole."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gptq_triton import reference
from gptq_triton.integrations.sharding import chunk, cut
from tests.strategies import FORMATS, random_weight


def parts_of(weight, bias=None):
    found = {"qweight": weight.qweight, "scales": weight.scales, "qzeros": weight.qzeros}
    found |= {} if weight.g_idx is None else {"g_idx": weight.g_idx}
    return found | ({} if bias is None else {"bias": bias})


def whole(weight, bias=None, **options):
    return cut(parts_of(weight, bias), weight.spec, (weight.K, weight.N), weight.checkpoint_format, **options)


@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    K=st.integers(1, 200),
    N=st.integers(1, 70),
    group_size=st.sampled_from((-1, 1, 7, 16, 32, 64, 100)),
    act_order=st.booleans(),
    form=st.sampled_from(FORMATS),
    data=st.data(),
)
def test_any_part_of_any_weight(bits, K, N, group_size, act_order, form, data):
    weight = random_weight(K, N, bits, group_size, act_order=act_order, checkpoint_format=form)
    bias = torch.arange(N, dtype=torch.float32)
    start = data.draw(st.integers(0, K - 1))
    rows = range(start, data.draw(st.integers(start + 1, K)))
    middle = data.draw(st.integers(0, N - 1))
    columns = [range(middle, N), range(0, middle)] if middle else [range(N)]
    found, own = whole(weight, bias, rows=rows, columns=columns)
    order = [n for run in columns for n in run]
    expected = reference.dequantize(weight, torch.float32)[rows.start : rows.stop][:, order]
    assert torch.equal(reference.dequantize(found, torch.float32), expected)
    assert torch.equal(own, bias[order])


@given(size=st.integers(1, 300), ranks=st.integers(1, 8))
def test_chunks_are_those_of_torch(size, ranks):
    pieces = torch.arange(size).chunk(ranks)
    if len(pieces) < ranks:
        with pytest.raises(ValueError, match=f"K is {size}, which leaves one of {ranks} ranks"):
            chunk(size, 0, ranks, "K")
    else:
        assert [list(chunk(size, rank, ranks)) for rank in range(ranks)] == [piece.tolist() for piece in pieces]


def test_whole_groups_stay_in_order():
    weight = random_weight(256, 32, 4, 64)
    for rank in range(2):
        found, _ = whole(weight, rows=chunk(256, rank, 2))
        assert (found.g_idx, found.spec.group_size, found.scales.shape[0]) == (None, 64, 2)
    found, _ = whole(weight, rows=range(32, 256))
    assert found.g_idx is not None
    assert found.scales.shape[0] == 4


def test_an_open_file_is_read_in_part(tmp_path):
    weight = random_weight(256, 64, 3, 32, act_order=True)
    save_file(parts_of(weight), tmp_path / "layer.safetensors")
    read = []

    class Watched:
        def __init__(self, part):
            self.part = part

        def __getitem__(self, index):
            read.append(self.part[index])
            return read[-1]

    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        lazy = {name: Watched(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        found, _ = cut(lazy, weight.spec, (256, 64), "gptq", rows=range(128, 256))
    expected, _ = whole(weight, rows=range(128, 256))
    assert torch.equal(found.qweight, expected.qweight)
    assert max(part.numel() for part in read) == weight.qweight.numel() // 2


def test_a_g_idx_outside_the_groups_is_refused():
    weight = random_weight(64, 32, 4, 32, act_order=True)
    weight.g_idx[3] = 2
    with pytest.raises(ValueError, match=r"g_idx must lie in \[0, 1\]"):
        whole(weight, rows=range(32))
