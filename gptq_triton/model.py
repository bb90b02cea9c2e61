"""Quantize a causal language model block by block: one decoder block on the accelerator at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checkpoint import atomic_write, read_tensors, save_tensors
from .config import QuantizeConfig
from .experts import Experts, ignoring, routers, skeleton, unfuse
from .layers import find_layers, weight_of
from .linear import QuantLinear
from .solver import Hessian, Solution, solve

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]  # input_ids (B, S) int64, and attention_mask (B, S) where tokens are padded


@dataclass(frozen=True)
class LayerReport:
    """How one layer came out.

    Attributes:
        name: Full module name.
        method: "gptq", or "rtn" where the solver fell back to rounding.
        bits: Width.
        group_size: Rows per group.
        error: Relative output error on the calibration inputs.
        error_rtn: The same for round-to-nearest.
        damp: Damping used.
        tokens: Tokens seen.
        seconds: Solving time (layers solved together share theirs evenly).
    """

    name: str
    method: str
    bits: int
    group_size: int
    error: float
    error_rtn: float
    damp: float
    tokens: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Target:
    """A layer to quantize, and how."""

    layer: nn.Module
    config: QuantizeConfig

    @property
    def shape(self) -> tuple[int, int]:
        N, K = weight_of(self.layer).shape
        return N, K


@dataclass(frozen=True)
class Estimate:
    """What a run will take, before it starts.

    Attributes:
        layers: Layers to quantize.
        tokens: Calibration tokens.
        packed_bytes: The quantized layers' checkpoint tensors.
        peak_bytes: On the device that solves: largest block, its Hessians, activations.
        seconds: From the operation count and a matmul timed now; a guess within a factor of 2 or so.
    """

    layers: int
    tokens: int
    packed_bytes: int
    peak_bytes: int
    seconds: float


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    calibration: Iterable[Any],
    config: QuantizeConfig | None = None,
    *,
    method: Literal["gptq", "rtn"] = "gptq",
    device: torch.device | str | None = None,
    workdir: str | Path | None = None,
    progress: bool = True,
) -> list[LayerReport]:
    """Quantize every linear layer of a model's decoder blocks, in place.

    Blocks are solved in sequence, each on the outputs of the quantized blocks before it. The result
    is a pure function of the arguments: no random number is drawn. Fused experts are taken apart into
    linear layers first; routers stay in full precision.

    Args:
        model: A transformers causal LM whose blocks live in an nn.ModuleList, with floating weights.
        calibration: Batches: token ids (S,) or (B, S) as tensors or lists, or mappings with
            ``input_ids`` and optionally ``attention_mask``, whose zeros are not counted.
        config: What to do; default: 4 bits, groups of 128, symmetric.
        method: "gptq", or "rtn" for round-to-nearest on the same grid rules (calibration then only
            measures the error).
        device: Where blocks are solved; default: the GPU if there is one, else where the model is.
            The model ends up where it was.
        workdir: Folder for finished blocks. A run that was killed resumes from it with identical
            results; it is left in place for the caller to remove.
        progress: Show a progress bar.

    Returns:
        One report per layer, in the order of solving. ``model.config.quantization_config`` is set.

    Raises:
        ValueError: The model has no blocks, calibration is empty, a layer's shape cannot be stored,
            experts cannot be taken apart, or workdir belongs to another run.
    """
    from tqdm.auto import tqdm  # with transformers, whose models these are

    config = config or QuantizeConfig()
    if config.lm_head:
        raise ValueError("lm_head=True: quantizing the output head is not supported; only decoder blocks are")
    if method not in ("gptq", "rtn"):
        raise ValueError(f"method must be 'gptq' or 'rtn', got {method!r}")
    batches = as_batches(calibration)
    unfuse(model, skip=lambda name: config.for_module(name) is None)
    blocks = decoder_blocks(model)
    plan = _plan(model, blocks, config)
    journal = _Journal(workdir, model, batches, config, method)
    device = torch.device(device) if device is not None else default_device(model)
    training = model.training
    model.eval()
    reports: list[LayerReport] = []
    try:
        hidden, calls = _capture(model, list(blocks.values()), batches, device)
        masks = [batch["attention_mask"].bool().to(device) if "attention_mask" in batch else None for batch in batches]
        with tqdm(total=len(plan), desc="quantizing", unit="layer", disable=not progress) as bar:
            for index, (block_name, block) in enumerate(blocks.items()):
                home = next(block.parameters()).device
                block.to(device)
                targets = {name: item for name, item in plan.items() if name.startswith(block_name + ".")}

                run = _runner(block, hidden, calls[index], device)
                done = journal.load(index)
                if done is None:
                    done = _solve_block(targets, run, masks, config, method, bar)
                    journal.save(index, *done)
                else:
                    bar.update(len(targets))
                packed, found = done
                for name, layer in packed.items():
                    weight_of(targets[name].layer).copy_(layer.to(device).dequantize(torch.float32))
                if index + 1 < len(blocks):
                    hidden = [run(batch) for batch in range(len(batches))]
                for name, layer in packed.items():
                    model.set_submodule(name, layer)
                block.to(home)
                reports += found
    finally:
        model.train(training)
    about: Any = model.config
    about.quantization_config = config.to_dict()
    return reports


def estimate(
    model: nn.Module, calibration: Iterable[Any], config: QuantizeConfig, device: torch.device | str | None = None
) -> Estimate:
    """What :func:`quantize_model` will take with the same arguments."""
    device = torch.device(device) if device is not None else default_device(model)
    model = skeleton(model, skip=lambda name: config.for_module(name) is None)
    blocks = decoder_blocks(model)
    plan = _plan(model, blocks, config)
    batches = as_batches(calibration)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    packed = operations = 0
    top_k = getattr(getattr(model, "config", None), "num_experts_per_tok", None)
    for name, target in plan.items():
        (N, K), spec = target.shape, target.config.spec()
        experts = model.get_submodule(".".join(name.split(".")[:-2]))
        seen = tokens * (top_k or len(experts)) / len(experts) if isinstance(experts, Experts) else tokens
        scale_and_zero = 2 + spec.bits / 8
        packed += int(N * K * spec.bits / 8 + spec.groups(K) * N * scale_and_zero + 4 * K)
        # two forward passes, the Hessian (an upper bound: siblings share one), solving, three energies
        operations += 2 * seen * K * (2 * N + K) + 8 * N * K * K + 2 * K**3
    sizes = {name: sum(p.numel() * p.element_size() for p in block.parameters()) for name, block in blocks.items()}
    hessians = {name: sum(4 * t.shape[1] ** 2 for n, t in plan.items() if n.startswith(name + ".")) for name in blocks}
    weight = next(iter(plan.values())).layer.weight
    width = min(t.shape[1] for t in plan.values())
    activations = tokens * width * weight.element_size()  # pyright: ignore
    return Estimate(
        layers=len(plan),
        tokens=tokens,
        packed_bytes=packed,
        peak_bytes=2 * activations + max(sizes[name] + hessians[name] for name in blocks),
        seconds=operations / _matmul_rate(device),
    )


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name and module of each decoder block, in order.

    Raises:
        ValueError: No nn.ModuleList looks like a stack of blocks.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = getattr(text, "num_hidden_layers", None)
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and find_layers(m)}
    stacks = {n: m for n, m in lists.items() if len(m) == depth} or lists
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no nn.ModuleList of blocks with linear layers")
    name = max(stacks, key=lambda n: sum(p.numel() for p in stacks[n].parameters()))
    return {f"{name}.{i}": block for i, block in enumerate(stacks[name])}


def default_device(model: nn.Module) -> torch.device:
    """The GPU if there is one, else where the model is."""
    return torch.device("cuda") if torch.cuda.is_available() else next(model.parameters()).device


def as_batches(calibration: Iterable[Any]) -> list[Batch]:
    """Calibration data as a list of batches.

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
        if "input_ids" not in batch or batch["input_ids"].dim() != 2 or not batch["input_ids"].numel():
            raise ValueError(f"calibration item {len(batches)} must be token ids (S,) or (B, S)")
        batches.append(batch)
    if not batches:
        raise ValueError("calibration must hold at least one batch of token ids")
    return batches


def _plan(model: nn.Module, blocks: Mapping[str, nn.Module], config: QuantizeConfig) -> dict[str, _Target]:
    """Full name to target, for every layer of the blocks that the rules do not leave alone."""
    plan, left = {}, routers(model)
    for block_name, block in blocks.items():
        for name, layer in find_layers(block, name=block_name).items():
            own = None if isinstance(layer, nn.Conv2d) or name in left else config.for_module(name)
            if own is not None:
                plan[name] = _Target(layer, own)
    if not plan:
        raise ValueError("the rules in `dynamic` leave no layer to quantize")
    for name, target in plan.items():
        if any(size * target.config.bits % 32 for size in target.shape):
            raise ValueError(
                f"{name} has {target.shape[1]} inputs and {target.shape[0]} outputs; {target.config.bits}-bit "
                f"checkpoints hold multiples of {32 if target.config.bits == 3 else 32 // target.config.bits}. "
                f"Leave it in full precision with dynamic={{'-:{name}': {{}}}}"
            )
    return plan


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once all it was run for is known."""


def _capture(
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


def _runner(
    block: nn.Module, hidden: list[Tensor], calls: list[tuple[tuple, dict]], device: torch.device
) -> Callable[..., Tensor]:
    """Batch number to the block's output for it; with a mask, experts see only the tokens it keeps."""

    def run(batch: int, mask: Tensor | None = None) -> Tensor:
        args, kwargs = calls[batch]
        with ignoring(block, mask):
            out = block(hidden[batch], *_to(args, device), **_to(kwargs, device))
        return out[0] if isinstance(out, tuple) else out

    return run


def _solve_block(
    targets: Mapping[str, _Target],
    run: Callable[..., Tensor],
    masks: list[Tensor | None],
    config: QuantizeConfig,
    method: Literal["gptq", "rtn"],
    bar: Any,
) -> tuple[dict[str, QuantLinear], list[LayerReport]]:
    """Solve all layers of one block, whose floating weights are overwritten by the quantized ones."""
    packed: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    for stage in _stages(targets, run) if config.true_sequential else [list(targets)]:
        observer = _Observer({name: targets[name].layer for name in stage})
        observer.watch(run, masks)
        for names in observer.groups({name: targets[name].config for name in stage}):
            own, started = targets[names[0]].config, time.perf_counter()
            bar.set_postfix_str(names[0].split(".", 2)[-1])
            hessian = observer.hessian(names[0])
            options = own.solver_options()
            solved = solve({n: weight_of(targets[n].layer) for n in names}, hessian, own.spec(), options, method)
            for name in names:
                weight_of(targets[name].layer).copy_(solved[name].dequantized)
                packed[name] = _quant_linear(targets[name].layer, solved[name])
                reports.append(_report(name, solved[name], own, (time.perf_counter() - started) / len(names)))
                bar.update()
    return packed, reports


class _Observer:
    """Collects the Hessians of some layers; layers that are given the same tensor share one."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self.leader: dict[str, str] = {}  # the layer whose Hessian a layer shares
        self._hessians: dict[str, Hessian] = {}
        self._inputs: dict[int, tuple[Tensor, str]] = {}  # of the forward pass under way

    def watch(self, run: Callable[..., Tensor], masks: list[Tensor | None]) -> None:
        """Run every batch and count what the layers are given."""
        for batch, mask in enumerate(masks):
            with ExitStack() as hooks:
                for name, layer in self.layers.items():

                    def see(_: nn.Module, args: tuple, name: str = name, mask: Tensor | None = mask) -> None:
                        self._see(name, args[0], mask)

                    hooks.callback(layer.register_forward_pre_hook(see).remove)
                run(batch, mask)
            self._inputs.clear()

    def hessian(self, name: str) -> Hessian:
        """What a layer was given; empty if it never ran."""
        layer = self.layers[name]
        weight = weight_of(layer)
        return self._hessians.get(self.leader.get(name, name)) or Hessian(weight.shape[1], weight.device)

    def groups(self, configs: Mapping[str, QuantizeConfig]) -> list[list[str]]:
        """Layers to solve together: same inputs, same configuration."""
        found: list[tuple[str, QuantizeConfig, list[str]]] = []
        for name, own in configs.items():
            leader = self.leader.get(name, name)
            for other, theirs, names in found:
                if other == leader and theirs == own:
                    names.append(name)
                    break
            else:
                found.append((leader, own, [name]))
        return [names for *_, names in found]

    def _see(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        # holding x keeps its id from being reused during this pass
        leader = self._inputs.setdefault(id(x), (x, name))[1]
        if self.leader.setdefault(name, leader) != leader:
            raise ValueError(f"{name} shares its input with {self.leader[name]} in one batch and not in another")
        if leader == name:
            rows = x
            if mask is not None and x.shape[:-1].numel() == mask.numel():
                rows = x.flatten(0, -2)[mask.flatten()]
            if name not in self._hessians:
                self._hessians[name] = Hessian(x.shape[-1], x.device)
            self._hessians[name].add(rows)


def _stages(targets: Mapping[str, _Target], run: Callable[..., Tensor]) -> list[list[str]]:
    """Layers of a block in the order they run, those with one input in one stage."""
    order: dict[int, list[str]] = {}
    alive: list[Tensor] = []
    with ExitStack() as hooks:
        for name, target in targets.items():

            def see(_: nn.Module, args: tuple, name: str = name) -> None:
                alive.append(args[0])
                order.setdefault(id(args[0]), []).append(name)

            hooks.callback(target.layer.register_forward_pre_hook(see).remove)
        run(0)
    seen = [name for stage in order.values() for name in stage]
    rest = [name for name in targets if name not in seen]
    return [*order.values(), *([rest] if rest else [])]


def _quant_linear(layer: nn.Module, solution: Solution) -> QuantLinear:
    bias = getattr(layer, "bias", None)
    return QuantLinear.from_packed(solution.weight, None if bias is None else bias.detach().clone())


def _report(name: str, solution: Solution, config: QuantizeConfig, seconds: float) -> LayerReport:
    return LayerReport(
        name,
        solution.method,
        config.bits,
        config.group_size,
        solution.error,
        solution.error_rtn,
        solution.damp,
        solution.tokens,
        seconds,
    )


class _Journal:
    """Finished blocks on disk, one atomic file each, tied to one exact run."""

    def __init__(
        self, folder: str | Path | None, model: nn.Module, batches: list[Batch], config: QuantizeConfig, method: str
    ):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        label = json.dumps({"run": _fingerprint(model, batches, config, method)})
        path = self.folder / "run.json"
        if not path.exists():
            atomic_write(path, label)
        elif path.read_text() != label:
            raise ValueError(
                f"workdir {self.folder} holds blocks of another run (other weights, calibration or config); "
                "remove it or name another"
            )

    def save(self, index: int, packed: Mapping[str, QuantLinear], reports: list[LayerReport]) -> None:
        if self.folder is None:
            return
        tensors = {
            f"{name}.{key}": value for name, layer in packed.items() for key, value in layer.state_dict().items()
        }
        layers = {
            name: [*asdict(layer.spec).values(), layer.infeatures, layer.outfeatures, layer.checkpoint_format]
            for name, layer in packed.items()
        }
        about = {"layers": json.dumps(layers), "reports": json.dumps([asdict(report) for report in reports])}
        save_tensors(self.folder / f"block-{index:05d}.safetensors", tensors, about)

    def load(self, index: int) -> tuple[dict[str, QuantLinear], list[LayerReport]] | None:
        if self.folder is None or not (path := self.folder / f"block-{index:05d}.safetensors").exists():
            return None
        tensors, about = read_tensors(path)
        packed = {}
        for name, (bits, group_size, _, _, K, N, checkpoint_format) in json.loads(about["layers"]).items():
            layer = QuantLinear(bits, group_size, K, N, device="meta", checkpoint_format=checkpoint_format)
            own = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            layer.load_state_dict(own, assign=True)
            layer.checkpoint_format = checkpoint_format  # known here, whatever the zero points look like
            packed[name] = layer
        return packed, [LayerReport(**report) for report in json.loads(about["reports"])]


def _fingerprint(model: nn.Module, batches: list[Batch], config: QuantizeConfig, method: str) -> str:
    """Differs when the result would: weights (sampled), calibration, configuration."""
    digest = hashlib.sha256(json.dumps([config.to_dict(), method], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    for batch in batches:
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _to(value: Any, device: torch.device) -> Any:
    """Every tensor inside tuples, lists and dicts, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return type(value)(_to(item, device) for item in value) if type(value) in (tuple, list) else value


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here, timed."""
    x = torch.ones(1024, 1024, device=device)
    float((x @ x).sum())  # warms up
    started = time.perf_counter()
    float((x @ x).sum())
    return 2 * 1024**3 / (time.perf_counter() - started)
