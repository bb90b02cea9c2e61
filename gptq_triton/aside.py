"""Work that a GPU does beside what comes next."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Aside(Generic[T]):
    """What a call returns: on a GPU it works on a stream of its own, elsewhere at once.

    Args:
        call: It must not change what is used elsewhere; what it uses must not be given up before `get`.
        device: Where it works.
    """

    def __init__(self, call: Callable[[], T], device: torch.device):
        self._device, self._stream = device, None
        if device.type != "cuda":
            self._value = call()
            return
        self._stream = _stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._value = call()

    def get(self) -> T:
        """The value; a GPU's current stream waits for it, the process does not."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return self._value


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
