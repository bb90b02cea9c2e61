"""Run a model block by block, and watch what its layers are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .experts import Experts, ignoring
from .hessian import Hessian
from .layers import find_layers, weight_of
from .linear import QuantLinear
from .ranks import Ranks

# input_ids (B, S) int64, and attention_mask (B, S) where tokens are padded; or what a model without tokens takes
Batch = dict[str, Tensor]

BATCH_TOKENS = 8192


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name and module of each decoder block, in order.

    Raises:
        ValueError: No nn.ModuleList looks like a stack of blocks.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and _has_layers(m)}
    stacks = {n: m for n, m in lists.items() if len(m) == depth} or lists
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers")
    name = max(stacks, key=lambda n: sum(p.numel() for p in stacks[n].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(stacks[name])}


def _has_layers(module: nn.Module) -> bool:
    return bool(find_layers(module)) or any(isinstance(each, QuantLinear) for each in module.modules())


def default_device(model: nn.Module) -> torch.device:
    """The GPU if there is one, else where the model is."""
    return torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device


def as_batches(calibration: Iterable[Any]) -> list[Batch]:
    """Calibration data as a list of batches; neighbours of one length are joined, up to BATCH_TOKENS.

    Raises:
        ValueError: There is none, or an item is not token ids.
    """
    batches = []
    for item in calibration:
        fields = item if isinstance(item, Mapping) else {"input_ids": item}
        batch = {}
        for name in ("input_ids", "attention_mask"):
            if fields.get(name) is not None:
                tensor = torch.as_tensor(fields[name]).long()
                batch[name] = tensor[None] if tensor.dim() == 1 else tensor
        if "input_ids" not in fields and fields and all(isinstance(value, Tensor) for value in fields.values()):
            batch = dict(fields)  # pictures and the like
        elif "input_ids" not in batch or batch["input_ids"].dim() != 2 or not batch["input_ids"].numel():
            raise ValueError(f"calibration item {len(batches)} must be token ids (S,) or (B, S), or tensors alone")
        batches.append(batch)
    if not batches:
        raise ValueError("calibration must hold at least one batch of token ids")
    return _joined(batches)


def _joined(batches: list[Batch]) -> list[Batch]:
    """Fewer and larger batches of the same sequences: a block's products are then large enough for a GPU."""
    joined: list[list[Batch]] = []
    kind, tokens = [], 0
    for batch in batches:
        size = batch["input_ids"].numel() if "input_ids" in batch else BATCH_TOKENS
        before, kind = kind, [(name, tensor.shape[1:], tensor.device) for name, tensor in batch.items()]
        if kind == before and tokens + size <= BATCH_TOKENS:
            joined[-1].append(batch)
            tokens += size
        else:
            joined.append([batch])
            tokens = size
    return [{name: torch.cat([batch[name] for batch in part]) for name in part[0]} for part in joined]


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once all it was run for is known."""


def capture(
    model: nn.Module, blocks: list[nn.Module], batches: list[Batch], device: torch.device
) -> tuple[list[Tensor], list[list[tuple[tuple, dict]]]]:
    """Run everything before the blocks; note how each block is called.

    Returns:
        The first block's hidden states per batch, and per block and batch the other arguments (masks
        and position embeddings differ between kinds of blocks). Equal arguments are kept once.
    """
    hidden: list[Tensor] = []
    calls: list[list[tuple[tuple, dict]]] = [[] for _ in blocks]
    kept: list[Tensor] = []

    def once(value: Any) -> Any:
        if isinstance(value, Tensor):
            for old in kept:
                if old is value or (old.shape == value.shape and old.dtype == value.dtype and torch.equal(old, value)):
                    return old
            kept.append(value)
            return value
        return type(value)(map(once, value)) if type(value) in (tuple, list) else value

    def stub(index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if "hidden_states" in kwargs:
                states = kwargs.pop("hidden_states")
            else:
                states, args = args[0], args[1:]
            if index == 0:
                hidden.append(states.to(device))
            calls[index].append((tuple(map(once, args)), {key: once(value) for key, value in kwargs.items()}))
            if index == len(blocks) - 1:
                raise _Stop
            return states

        return forward

    where = next(model.parameters()).device
    with ExitStack() as undo:
        for index, block in enumerate(blocks):
            block.forward = stub(index)
            undo.callback(delattr, block, "forward")
        for batch in batches:
            try:
                model(**{name: tensor.to(where) for name, tensor in batch.items()}, use_cache=False)
            except _Stop:
                continue
            raise ValueError(f"{type(model).__name__} does not run its blocks in order")
    return hidden, calls


def head_inputs(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    head: nn.Module,
    batches: list[Batch],
    hidden: list[Tensor],
    device: torch.device,
) -> list[Tensor]:
    """What the output head is given, per batch, when the last block puts out ``hidden``."""
    found: list[Tensor] = []
    where = next(model.parameters()).device

    def stop(_: nn.Module, args: tuple) -> None:
        found.append(args[0].to(device))
        raise _Stop

    with ExitStack() as undo:
        undo.callback(head.register_forward_pre_hook(stop).remove)
        for block in blocks:
            block.forward = lambda *args, **kwargs: hidden[len(found)].to(where)
            undo.callback(delattr, block, "forward")
        for batch in batches:
            try:
                model(**{name: tensor.to(where) for name, tensor in batch.items()}, use_cache=False)
            except _Stop:
                continue
            raise ValueError(f"{type(model).__name__} does not run its output head")
    return found


def output_head(model: nn.Module) -> dict[str, nn.Module]:
    """Name and module of the output head.

    Raises:
        ValueError: There is none.
    """
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    for name, module in model.named_modules():
        if module is head:
            return {name: module}
    raise ValueError(f"lm_head=True, but {type(model).__name__} has no output head")


def runner(
    block: nn.Module, hidden: list[Tensor], calls: list[tuple[tuple, dict]], device: torch.device
) -> Callable[..., Tensor]:
    """Batch number to the block's output for it; with a mask, experts see only the tokens it keeps."""

    def run(batch: int, mask: Tensor | None = None) -> Tensor:
        args, kwargs = calls[batch]
        with ignoring(block, mask):
            out = block(hidden[batch], *_to(args, device), **_to(kwargs, device))
        return out[0] if isinstance(out, tuple) else out

    return run


@contextmanager
def _watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """``see(name, x)`` is called with every input of every layer."""
    with ExitStack() as hooks:
        for name, layer in layers.items():

            def hook(_: nn.Module, args: tuple, name: str = name) -> None:
                see(name, args[0])

            hooks.callback(layer.register_forward_pre_hook(hook).remove)
        yield


class FullPrecision:
    """A block as it is now, to be run on the hidden states of the full-precision model.

    Args:
        block: It is copied.
        name: Its full name.
        hidden: What the full-precision model gives it, per batch.
        calls: Its other arguments, per batch.
        device: Where the block is.
    """

    def __init__(
        self, block: nn.Module, name: str, hidden: list[Tensor], calls: list[tuple[tuple, dict]], device: torch.device
    ):
        block = copy.deepcopy(block)
        # a router may send a token to other experts in the quantized model: their inputs do not correspond
        routed = tuple(f"{name}.{path}." for path, each in block.named_modules() if isinstance(each, Experts))
        self._layers = {n: layer for n, layer in find_layers(block, name=name).items() if not n.startswith(routed)}
        self._run = runner(block, hidden, calls, device)
        self._outputs: dict[int, Tensor] = {}

    def inputs(self, batch: int, names: Iterable[str]) -> dict[str, Tensor]:
        """What some layers are given, by their full names."""
        found: dict[str, Tensor] = {}
        layers = {name: self._layers[name] for name in names if name in self._layers}
        if not layers and batch in self._outputs:
            return found

        def see(name: str, x: Tensor) -> None:
            found[name] = x
            if batch in self._outputs and len(found) == len(layers):
                raise _Stop

        with _watching(layers, see), suppress(_Stop):
            self._outputs[batch] = self._run(batch)
        return found

    def output(self, batch: int) -> Tensor:
        """What the block puts out."""
        return self._outputs[batch] if batch in self._outputs else self._run(batch)


class Observer:
    """Collects the Hessians of some layers; layers that are given the same tensor share one."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.leader: dict[str, str] = {}  # the layer whose Hessian a layer shares
        self._hessians: dict[str, Hessian] = {}
        self._inputs: dict[int, tuple[Tensor, str]] = {}  # of the forward pass under way
        self._last: str | None = None  # the layer at which a forward pass may stop

    def watch(
        self,
        run: Callable[..., Tensor],
        masks: list[Tensor | None],
        ranks: Ranks,
        full: FullPrecision | None = None,
    ) -> None:
        """Run this process's batches and count what the layers are given, beside what full precision gives them."""
        self._hessians = ranks.total(self._watched(run, masks, part, full) for part in ranks.parts)
        for leaders in ranks.gather(self.leader):  # a layer may have run for other processes alone
            self.leader |= leaders

    def _watched(
        self, run: Callable[..., Tensor], masks: list[Tensor | None], batches: range, full: FullPrecision | None
    ) -> dict[str, Hessian]:
        """The Hessians of some batches.

        Where the first batch came to every layer once, later ones stop at the layer that was last.
        """
        self._hessians = {}
        batch, seen, wanted = 0, [], {}

        def see(name: str, x: Tensor) -> None:
            self._see(name, x, masks[batch], wanted.get(name))
            seen.append(name)
            if name == self._last:
                raise _Stop

        with _watching(self.layers, see):
            for batch in batches:
                seen, wanted = [], {} if full is None else full.inputs(batch, self.layers)
                with suppress(_Stop):
                    run(batch, masks[batch])
                self._inputs.clear()
                if batch == 0 and seen and sorted(seen) == sorted(self.layers):
                    self._last = seen[-1]
        return self._hessians

    def hessian(self, name: str) -> Hessian:
        """What a layer was given; empty if it never ran."""
        found = self._hessians.get(self.leader.get(name, name))
        if found is not None:
            return found
        weight = weight_of(self.layers[name])
        return Hessian(weight.shape[1], weight.device)

    def groups(self, kinds: Mapping[str, Hashable]) -> list[list[str]]:
        """Layers to solve together: same inputs, same kind."""
        found: dict[Hashable, list[str]] = {}
        for name, kind in kinds.items():
            found.setdefault((self.leader.get(name, name), kind), []).append(name)
        return list(found.values())

    def _see(self, name: str, x: Tensor, mask: Tensor | None, full: Tensor | None) -> None:
        # holding x keeps its id from being reused during this pass
        leader = self._inputs.setdefault(id(x), (x, name))[1]
        if self.leader.setdefault(name, leader) != leader:
            raise ValueError(f"{name} shares its input with {self.leader[name]} in one batch and not in another")
        if leader == name:
            rows = x
            if mask is not None and x.shape[:-1].numel() == mask.numel():
                rows = x.flatten(0, -2)[mask.flatten()]
                full = None if full is None else full.flatten(0, -2)[mask.flatten()]
            if name not in self._hessians:
                self._hessians[name] = Hessian(x.shape[-1], x.device)
            self._hessians[name].add(rows, full)


def stages(layers: Mapping[str, nn.Module], run: Callable[..., Tensor]) -> list[list[str]]:
    """Layers of a block in the order they run, those with one input in one stage."""
    order: dict[int, list[str]] = {}
    alive: list[Tensor] = []

    def see(name: str, x: Tensor) -> None:
        alive.append(x)
        order.setdefault(id(x), []).append(name)

    with _watching(layers, see):
        run(0)
    seen = [name for stage in order.values() for name in stage]
    rest = [name for name in layers if name not in seen]
    return [*order.values(), *([rest] if rest else [])]


def _to(value: Any, device: torch.device) -> Any:
    """Every tensor inside tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return type(value)(_to(item, device) for item in value) if type(value) in (tuple, list) else value
