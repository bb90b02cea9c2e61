"""Counters of launches: shared by those of a stream, and for every captured launch its own, zero and set aside."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton.scratch import Scratch


@pytest.fixture(scope="module")
def stream():
    """Streams of a machine without a GPU; whether one is being captured can be set."""
    state = SimpleNamespace(capturing=False, waits=0)

    def synchronize() -> None:
        assert not state.capturing
        state.waits += 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=synchronize))
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(Scratch, "CAPTURED", 64)
        patch.setattr(Scratch, "COUNTERS", 8)
        yield state
        state.capturing = False


@given(graphs=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), min_size=1, max_size=30))
def test_captured_launches_never_share_counters(stream, graphs):
    scratch = Scratch(torch.device("cpu"))
    taken: set[int] = set()
    for launches in graphs:
        scratch.tensors(0, 5, 3)  # as everybody does before a capture
        assert 2 * scratch.used <= Scratch.CAPTURED
        stream.capturing = True
        for counters in launches:
            memory, zeros = scratch.tensors(1, 7, counters)
            assert len(memory) >= 7
            assert zeros.tolist() == [0] * counters
            places = {zeros.data_ptr() + 4 * i for i in range(counters)}
            if sum(launches) <= Scratch.CAPTURED // 2:
                inside = [s.data_ptr() <= zeros.data_ptr() < s.data_ptr() + 4 * len(s) for s in scratch.captured]
                assert inside[-1] or not counters  # set aside, not zeroed by every replay
                assert not places & taken
                taken |= places
        stream.capturing = False
    assert len({s.data_ptr() for s in scratch.captured}) == len(scratch.captured)  # all are kept: graphs refer to them


def test_a_graph_of_more_counters_than_are_left_has_them_zeroed(stream):
    scratch = Scratch(torch.device("cpu"))
    stream.capturing = True
    scratch.tensors(0, 1, 60)
    _, zeros = scratch.tensors(0, 1, 10)
    stream.capturing = False
    first = scratch.captured[0]
    assert not first.data_ptr() <= zeros.data_ptr() < first.data_ptr() + 4 * len(first)
    assert zeros.tolist() == [0] * 10
    waits = stream.waits
    scratch.tensors(0, 1, 1)
    assert (len(scratch.captured), scratch.used, stream.waits) == (2, 0, waits + 1)


def test_launches_of_a_stream_share_what_they_need(stream):
    scratch = Scratch(torch.device("cpu"))
    memory, zeros = scratch.tensors(0, 10, 2)
    assert (len(memory), len(zeros)) == (10, 8)
    assert scratch.get(0, 7, 8) == (memory.data_ptr(), zeros.data_ptr())
    assert scratch.get(1, 7, 8) != (memory.data_ptr(), zeros.data_ptr())
    more, zeros = scratch.tensors(0, 11, 9)
    assert (len(more), zeros.tolist()) == (11, [0] * 9)
