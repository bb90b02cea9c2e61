"""Quantizing on several GPUs: each process runs some batches, whose Hessians are added, and solves some layers."""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .hessian import Hessian

PARTS = 8  # into which batches are cut, however many processes share them

Hessians = Mapping[str, Hessian]


class Ranks:
    """Which batches this process runs, and how sums over all batches come together.

    Batches are cut into PARTS parts, and sums over parts are added along one binary tree. Processes hold whole
    branches of it, so that the sum is the same, bit for bit, with any number of them.

    Args:
        batches: How many there are in all.
        group: Of the processes; None: this one is alone.

    Raises:
        ValueError: The number of processes does not divide PARTS, or there are too few batches for them.
    """

    def __init__(self, batches: int, group: dist.ProcessGroup | None = None):
        self.group = group
        self.rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if PARTS % size:
            raise ValueError(f"group must have 1, 2, 4 or 8 processes, got {size}")
        cuts = [-(-batches * part // PARTS) for part in range(PARTS + 1)]
        shares = [range(start, stop) for start, stop in itertools.pairwise(cuts[:: PARTS // size])]
        if group is not None and not all(shares):
            raise ValueError(f"calibration must be {size} batches of about 8192 tokens or more, got {batches}")
        self.batches = shares[self.rank]
        first, own = self.batches.start, PARTS // size
        parts = itertools.pairwise(cuts[self.rank * own : (self.rank + 1) * own + 1])
        self.parts = [range(start - first, stop - first) for start, stop in parts]

    def total(self, parts: Iterator[Hessians]) -> dict[str, Hessian]:
        """The sums over all batches, on every process, from those over each of this process's parts."""
        own = _branch(parts, len(self.parts))
        if self.group is None:
            return own
        every = self.gather({name: (len(h.sum), h.tokens, h.drift is not None) for name, h in own.items()})
        names = sorted(set().union(*every))
        return {name: self._added(own.get(name), [each.get(name) for each in every]) for name in names}

    def gather(self, value: Any) -> list[Any]:
        """The value of each process."""
        if self.group is None:
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The process that does each of some jobs, so that none has much more to do than others; the same on all."""
        loads = [0.0] * (1 if self.group is None else dist.get_world_size(self.group))
        chosen = [0] * len(costs)
        for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
            chosen[job] = loads.index(min(loads))
            loads[chosen[job]] += costs[job]
        return chosen

    def share(self, owner: int, value: Any, device: torch.device) -> Any:
        """One process's value, with tensors in it, on every process; theirs are on a device."""
        if self.group is None:
            return value
        source = dist.get_global_rank(self.group, owner)
        pickler = _Pickler()
        sent = [pickler.of(value) if owner == self.rank else b""]
        dist.broadcast_object_list(sent, source, self.group)
        tensors = pickler.tensors
        if owner != self.rank:
            unpickler = _Unpickler(io.BytesIO(sent[0]), device)
            value, tensors = unpickler.load(), unpickler.tensors
        for tensor in tensors:
            dist.broadcast(tensor, source, self.group)
        return value

    def _added(self, own: Hessian | None, about: list[tuple[int, int, bool] | None]) -> Hessian:
        """One Hessian of all processes; about: size, tokens and whether there is a drift, of each that has it."""
        K = next(each[0] for each in about if each)
        device = torch.device("cuda") if dist.get_backend(self.group) == "nccl" else torch.device("cpu")
        device = own.sum.device if own else device
        mine = own or Hessian(K, device)
        found = [Hessian(K, "meta") for _ in about]
        for name in ("sum", "drift"):
            if name == "drift" and not any(each and each[2] for each in about):
                continue
            tensor = getattr(mine, name)
            tensor = torch.zeros(K, K, device=device) if tensor is None else tensor
            copies = [torch.empty_like(tensor) for _ in about]
            dist.all_gather(copies, tensor, group=self.group)
            for hessian, copy in zip(found, copies, strict=True):
                setattr(hessian, name, copy)
        for hessian, each in zip(found, about, strict=True):
            hessian.tokens = each[1] if each else 0
        return _branch(iter([{"": hessian} for hessian in found]), len(found))[""]


def _branch(parts: Iterator[Hessians], count: int) -> dict[str, Hessian]:
    """The sum over the next parts, a power of two of them; those still to come are not computed before."""
    if count == 1:
        return dict(next(parts))
    left, right = _branch(parts, count // 2), _branch(parts, count // 2)
    for name, hessian in right.items():
        if name in left:
            left[name].merge(hessian)
        else:
            left[name] = hessian
    return left


class _Pickler(pickle.Pickler):
    """Keeps tensors apart, which travel by themselves."""

    def __init__(self) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self.tensors: list[torch.Tensor] = []

    def of(self, value: Any) -> bytes:
        self.dump(value)
        return self._file.getvalue()

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensors.append(obj.contiguous())
        return tuple(obj.shape), obj.dtype


class _Unpickler(pickle.Unpickler):
    """Makes room for the tensors."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self._device = device
        self.tensors: list[torch.Tensor] = []

    def persistent_load(self, pid: Any) -> torch.Tensor:
        shape, dtype = pid
        self.tensors.append(torch.empty(shape, dtype=dtype, device=self._device))
        return self.tensors[-1]
