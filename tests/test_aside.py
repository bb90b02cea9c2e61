"""Work beside other work, as far as a CPU has it: order, how many calls at once, errors."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_triton.aside import Aside, map_at_once

CPU = torch.device("cpu")


@given(st.integers(0, 12), st.integers(1, 4))
def test_results_come_in_order_and_few_calls_run_ahead(count, at_once):
    lock, running, most, begun = threading.Lock(), 0, 0, 0

    def call(item: int) -> int:
        nonlocal running, most, begun
        with lock:
            running, begun = running + 1, begun + 1
            most = max(most, running)
        with lock:
            running -= 1
        return item * item

    for item, found in enumerate(map_at_once(call, range(count), CPU, at_once)):
        assert found == item * item
        with lock:
            assert begun <= item + 1 + at_once
    assert begun == count
    assert most <= at_once


def test_the_first_call_is_made_alone():
    seen: list[str] = []
    list(map_at_once(lambda item: seen.append(threading.current_thread().name), range(4), CPU, 2))
    assert seen[0] == threading.current_thread().name
    assert threading.current_thread().name not in seen[1:]


@pytest.mark.parametrize("at_once", [1, 3])
def test_errors_reach_the_caller(at_once):
    def call(item: int) -> int:
        if item == 2:
            raise ValueError(f"item {item}")
        return item

    results = map_at_once(call, range(6), CPU, at_once)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_a_cpu_does_it_at_once():
    aside, seen = Aside(CPU, "test"), []
    assert aside.run(lambda: seen.append(1) or 7) == 7
    assert seen == [1]
    aside.join()
