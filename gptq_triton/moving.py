"""Blocks on their way to a GPU and back, while the GPU works on another."""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import nn


class Mover:
    """Brings blocks to a device, the next one ahead of time, and takes them home, beside what runs there.

    On a GPU a thread of its own makes the copies, on a stream of its own. Elsewhere nothing is done ahead.

    Args:
        device: Where blocks are worked on.
        ahead: Whether to move beside the work; default: on a GPU.
    """

    def __init__(self, device: torch.device, ahead: bool | None = None):
        if device.type == "cuda" and device.index is None:  # a thread has a current device of its own
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        ahead = device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._coming: dict[nn.Module, tuple[Future[None], torch.device]] = {}
        self._leaving: list[Future[None]] = []

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait for all copies; a block that was brought for nothing goes home."""
        if self._thread is None:
            return
        with self._thread:
            for block, (_, home) in self._coming.items():
                self.leave(block, home)
        for future in self._leaving:
            if kind is None or future.exception() is None:  # an error of the work comes first
                future.result()

    def fetch(self, block: nn.Module) -> None:
        """Start to bring a block that is needed next."""
        home = next(block.parameters()).device
        if self._thread is not None and home.type != self.device.type:
            self._coming[block] = self._thread.submit(self._move, block, self.device), home

    def take(self, block: nn.Module) -> None:
        """The block is on the device when this returns, and the current stream may use it."""
        future, _ = self._coming.pop(block, (None, None))
        if future is None:
            block.to(self.device)
            return
        future.result()
        if self._stream is not None:
            self._used_on(block, torch.cuda.current_stream(self.device))

    def leave(self, block: nn.Module, home: torch.device) -> None:
        """Take a block home once the current stream is done with it; until the end it must not be used."""
        if self._thread is None or home.type == self.device.type:
            block.to(home)
            return
        done: Any = None
        if self._stream is not None:
            done = torch.cuda.current_stream(self.device).record_event()
            self._used_on(block, self._stream)
        self._leaving.append(self._thread.submit(self._move, block, home, done))

    @staticmethod
    def _used_on(block: nn.Module, stream: torch.cuda.Stream) -> None:
        """A block's memory is not given to others before a stream, which is not the one it was made on, is done."""
        for tensor in itertools.chain(block.parameters(), block.buffers()):
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def _move(self, block: nn.Module, where: torch.device, after: torch.cuda.Event | None = None) -> None:
        if self._stream is None:
            block.to(where)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            block.to(where)
            self._stream.synchronize()
