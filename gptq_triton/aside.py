"""Work that a GPU does beside other work."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Aside:
    """On a GPU a stream that starts from what the current one has been given so far; elsewhere nothing.

    Nor while work is recorded: what recordings do at once would share the memory that cuBLAS keeps for a stream.

    Args:
        device: Where the work is done.
        name: Of the stream: work of one name and thread is done in turn.
    """

    def __init__(self, device: torch.device, name: str):
        self._stream, self._start = None, None
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
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
