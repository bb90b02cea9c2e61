"""Work that a GPU does beside other work."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

A = TypeVar("A")
T = TypeVar("T")


class Aside:
    """On a GPU a stream that starts from what the current one has been given so far; elsewhere nothing.

    Args:
        device: Where the work is done.
        name: Of the stream: work of one name and thread is done in turn.
    """

    def __init__(self, device: torch.device, name: str):
        self._stream, self._start = None, None
        if device.type == "cuda":
            self._stream = _stream(device, name, threading.get_ident())
            self._start = torch.cuda.current_stream(device).record_event()

    def run(self, call: Callable[[], T]) -> T:
        """What a call returns, to be read after `join`; until then it must not be changed or given up what it uses."""
        if self._stream is None or self._start is None:
            return call()
        self._stream.wait_event(self._start)
        with torch.cuda.stream(self._stream):
            return call()

    def join(self) -> None:
        """The current stream waits for the work, the process does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@functools.cache
def _stream(device: torch.device, name: str, thread: int) -> torch.cuda.Stream:
    """One for each thread: what it frees is not taken by work that knows nothing of the thread's current stream."""
    return torch.cuda.Stream(device)


def map_at_once(call: Callable[[A], T], items: Iterable[A], device: torch.device, at_once: int) -> Iterator[T]:
    """As ``map``, with some calls at once, each in a thread and on a GPU on a stream of its own.

    The first call is made alone, so that what is compiled is compiled once.

    Args:
        call: It waits for its own work, so that any stream may use what it returns.
        items: What it is called with.
        device: Where it works.
        at_once: How many calls.
    """
    rest = iter(items)
    own, stream = threading.local(), None
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)

    def here(item: A) -> T:
        if stream is None:
            return call(item)
        own.stream = getattr(own, "stream", None) or torch.cuda.Stream(device)
        own.stream.wait_stream(stream)
        with torch.cuda.stream(own.stream):
            return call(item)

    yield from map(call, itertools.islice(rest, 1 if at_once > 1 else None))
    with ThreadPoolExecutor(at_once) as threads:
        waiting = deque(threads.submit(here, item) for item in itertools.islice(rest, at_once))
        while waiting:
            found = waiting.popleft().result()
            waiting.extend(threads.submit(here, item) for item in itertools.islice(rest, 1))
            yield found
