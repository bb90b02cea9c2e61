"""Blocks move beside the work: in order, whole, and with their errors."""

import threading

import pytest
import torch
from torch import nn

from gptq_triton.moving import Mover

HOME, AWAY = torch.device("cpu"), torch.device("meta")  # what comes back from there has no values


@pytest.fixture
def threads(monkeypatch):
    """The threads that moved something."""
    found, move = [], Mover._move
    monkeypatch.setattr(
        Mover, "_move", lambda self, *args: found.append(threading.current_thread()) or move(self, *args)
    )
    return found


def test_what_was_fetched_is_there_when_it_is_taken(threads):
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    with Mover(AWAY, ahead=True) as mover:
        for index, block in enumerate(blocks):
            mover.take(block)
            assert block.weight.device == AWAY
            if index < 2:
                mover.fetch(blocks[index + 1])
    assert len(threads) == 2  # the first was taken at once
    assert threading.main_thread() not in threads


def test_nothing_is_ahead_where_everything_is(threads):
    block = nn.Linear(3, 3)
    for mover in (Mover(HOME), Mover(HOME, ahead=True)):
        with mover:
            mover.fetch(block)
            mover.take(block)
            mover.leave(block, HOME)
    assert not threads


def never_comes_home():
    with Mover(AWAY, ahead=True) as mover:
        block = nn.Linear(3, 3)
        mover.take(block)
        mover.leave(block, HOME)


def fails_at_work():
    with Mover(AWAY, ahead=True) as mover:
        mover.fetch(nn.Linear(3, 3))  # goes home again, which fails here
        raise KeyError


def test_errors_are_raised_and_those_of_the_work_come_first():
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        never_comes_home()
    with pytest.raises(KeyError):
        fails_at_work()
