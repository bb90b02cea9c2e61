"""Memory of a GPU that outlives the launches that use it: partial sums, and the counters by which programs meet."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Scratch:
    """Memory of a GPU that outlives a launch.

    Launches of one stream follow each other, so they share it. A captured launch may be replayed on any stream, beside
    anything: it has scratch memory of its graph's and counters of its own for ever. While one is captured nothing that
    lasts can be allocated, so these counters are set aside before, and again where a launch that is not captured finds
    half of them taken.
    """

    COUNTERS = 1 << 14
    CAPTURED = 1 << 21

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.words: dict[int, Tensor] = {}
        self.zeros: dict[int, Tensor] = {}
        self.captured: list[Tensor] = []
        self.used = 0  # of the last of them
        self.lock = threading.Lock()  # for launches that belong together
        self._counting = threading.Lock()
        self._set_aside()

    def get(self, stream: int, words: int, counters: int) -> tuple[int, int]:
        """The addresses of `tensors`."""
        memory, zeros = self.tensors(stream, words, counters)
        return memory.data_ptr(), zeros.data_ptr()

    def tensors(self, stream: int, words: int, counters: int) -> tuple[Tensor, Tensor]:
        """At least so many uninitialized words, and zeroed counters, which the kernel leaves at zero."""
        if torch.cuda.is_current_stream_capturing():
            memory = torch.empty(words, dtype=torch.int32, device=self.device)
            with self._counting:
                if self.used + counters > self.CAPTURED:  # rare: zeroed by every replay
                    return memory, torch.zeros(counters, dtype=torch.int32, device=self.device)
                self.used += counters
                return memory, self.captured[-1][self.used - counters : self.used]
        if 2 * self.used > self.CAPTURED:
            self._set_aside()
        memory = self.words.get(stream)
        if memory is None or len(memory) < words:
            memory = self.words[stream] = self._lasting(torch.empty, words)
        zeros = self.zeros.get(stream)
        if zeros is None or len(zeros) < counters:
            zeros = self.zeros[stream] = self._lasting(torch.zeros, max(counters, self.COUNTERS))
        return memory, zeros

    def _set_aside(self) -> None:
        more = self._lasting(torch.zeros, self.CAPTURED)
        torch.cuda.current_stream(self.device).synchronize()
        with self._counting:
            self.captured.append(more)
            self.used = 0

    def _lasting(self, make: Callable[..., Tensor], length: int) -> Tensor:
        """Memory from the common pool, whichever pool this thread is told to take from.

        torch.compile's CUDA graphs run a model once inside their pool, where what outlives the run is an error.
        """
        stream = torch.cuda.current_stream(self.device)

        def allocate() -> Tensor:
            with torch.cuda.stream(stream):
                return make(length, dtype=torch.int32, device=self.device)

        with ThreadPoolExecutor(1) as other:
            return other.submit(allocate).result()


@functools.cache
def scratch_of(device: int) -> Scratch:
    """That of a GPU. The first call allocates what cannot be while a CUDA graph is captured."""
    return Scratch(torch.device("cuda", device))
