"""Quantize a causal language model block by block: one decoder block on the accelerator at a time."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .config import QuantizeConfig
from .embedding import empty_embedding, untie
from .experts import Experts, routers, skeleton, unfuse
from .hessian import Hessian
from .journal import Journal
from .layers import find_layers, weight_of
from .linear import QuantLinear
from .moving import Mover
from .ranks import Ranks
from .recording import LANES, OFTEN, Recorder, Solve
from .solver import Solution, solve
from .streaming import (
    FullPrecision,
    Observer,
    as_batches,
    capture,
    decoder_blocks,
    default_device,
    head_inputs,
    output_head,
    runner,
    stages,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


logger = logging.getLogger(__name__)


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
    group: ProcessGroup | None = None,
) -> list[LayerReport]:
    """Quantize every linear layer of a model's decoder blocks, and its output head on request, in place.

    Blocks are solved in sequence, each on the outputs of the quantized blocks before it, and the head last.
    The result is a pure function of the arguments: no random number is drawn. Fused experts are taken apart
    into linear layers first; routers stay in full precision, and so does an embedding that shared its
    weight with a quantized head.

    Args:
        model: A transformers causal LM, encoder or vision model whose blocks live in an nn.ModuleList, with
            floating weights.
        calibration: Batches: token ids (S,) or (B, S) as tensors or lists, or mappings with
            ``input_ids`` and optionally ``attention_mask``, whose zeros are not counted, or mappings of
            other tensors (``pixel_values``) for a model that takes no tokens.
        config: What to do; default: 4 bits, groups of 128, symmetric.
        method: "gptq", or "rtn" for round-to-nearest on the same grid rules (calibration then only
            measures the error).
        device: Where blocks are solved; default: the GPU if there is one, else where the model is.
            The model ends up where it was.
        workdir: Folder for finished blocks. A run that was killed resumes from it with identical
            results; it is left in place for the caller to remove.
        progress: Show a progress bar.
        group: Of 2, 4 or 8 processes that share the calibration, each with the same arguments and a device of its
            own; every one ends up with the same model, bit for bit that of one process alone.

    Returns:
        One report per layer, in the order of solving. ``model.config.quantization_config`` is set.

    Raises:
        ValueError: The model has no blocks, or no head to quantize, calibration is empty, a layer has a shape
            that cannot be stored, experts cannot be taken apart, workdir belongs to another run, or the group is
            of another size or larger than the calibration.
    """
    from tqdm.auto import tqdm  # with transformers, whose models these are

    config = config or QuantizeConfig()
    if method not in ("gptq", "rtn"):
        raise ValueError(f"method must be 'gptq' or 'rtn', got {method!r}")
    batches = as_batches(calibration)
    unfuse(model, skip=lambda name: config.for_module(name) is None)
    blocks = decoder_blocks(model)
    parts = blocks | (output_head(model) if config.lm_head else {})
    plan = _plan(model, parts, config)
    ranks = Ranks(len(batches), group)
    journal = Journal(workdir, model, batches, config, method)
    batches = [batches[index] for index in ranks.batches]
    device = torch.device(device) if device is not None else default_device(model)
    training = model.training
    model.eval()
    reports: list[LayerReport] = []
    recorder = Recorder()
    try:
        if config.embeddings:
            reports += _quantize_embedding(model, config, device)
        hidden, calls = capture(model, list(blocks.values()), batches, device)
        feedback = method == "gptq" and any(target.config.feedback for target in plan.values())
        if feedback and not config.true_sequential:
            logger.warning("feedback without true_sequential makes up for one error several times: models become worse")
        ideal = hidden if feedback else []  # hidden states of the full-precision model
        masks = [batch["attention_mask"].bool().to(device) if "attention_mask" in batch else None for batch in batches]
        silent = not progress or ranks.rank > 0
        with Mover(device) as mover, tqdm(total=len(plan), desc="quantizing", unit="layer", disable=silent) as bar:
            homes = {name: next(block.parameters()).device for name, block in parts.items()}
            for index, (block_name, block) in enumerate(parts.items()):
                calls_here = calls[index] if block_name in blocks else [((), {})] * len(batches)
                # a layer that has been replaced is nobody's: it lies where its block was solved
                targets = {n: plan.pop(n) for n in tuple(plan) if f"{n}.".startswith(block_name + ".")}
                if block_name in blocks:
                    mover.take(block)
                    if index + 1 < len(blocks):
                        mover.fetch(list(blocks.values())[index + 1])
                elif targets:
                    hidden, ideal = (
                        head_inputs(model, blocks.values(), block, batches, states, device) if states else []
                        for states in (hidden, ideal)
                    )
                    untie(model, [block_name])
                    block.weight = nn.Parameter(weight_of(block).detach().clone())  # overwritten as it is solved
                    block.to(device)
                else:  # a rule leaves the head alone
                    break
                run = runner(block, hidden, calls_here, device)
                full = FullPrecision(block, block_name, ideal, calls_here, device) if feedback else None
                if (kept := journal.load(index)) is None:
                    packed, found = _solve_block(targets, run, full, masks, ranks, config, method, recorder, bar)
                    if ranks.rank == 0:
                        journal.save(index, packed, found)
                else:
                    packed, found = kept[0], [LayerReport(**report) for report in kept[1]]
                    for name, layer in packed.items():
                        weight_of(targets[name].layer).copy_(layer.to(device).dequantize(torch.float32))
                    bar.update(len(targets))
                if index + 1 < len(parts):
                    ideal = [full.output(batch) for batch in range(len(batches))] if full else []
                    for batch in range(len(batches)):
                        hidden[batch] = run(batch)
                for name, layer in packed.items():
                    model.set_submodule(name, layer)
                mover.leave(model.get_submodule(block_name), homes[block_name])
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
    blocks = decoder_blocks(model) | (output_head(model) if config.lm_head else {})
    plan = _plan(model, blocks, config)
    batches = as_batches(calibration)
    # a picture is taken for 256 tokens
    tokens = sum(b["input_ids"].numel() if "input_ids" in b else 256 * len(next(iter(b.values()))) for b in batches)
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
    hessians = {
        name: sum(4 * t.shape[1] ** 2 for n, t in plan.items() if f"{n}.".startswith(name + ".")) for name in blocks
    }
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


def _quantize_embedding(model: nn.Module, config: QuantizeConfig, device: torch.device) -> list[LayerReport]:
    """Round the vectors of the input embedding, which see no calibration, to nearest, unless a rule spares it."""
    started = time.perf_counter()
    table: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    name = next(name for name, module in model.named_modules() if module is table)
    own = config.for_module(name)
    if own is None:
        return []
    own = dataclasses.replace(own, desc_act=False)
    _check_storable(name, (table.num_embeddings, table.embedding_dim), own)
    layer = empty_embedding(table, own.bits, own.group_size, checkpoint_format=own.checkpoint_format)
    every = Hessian(table.embedding_dim, device)
    every.add(torch.eye(table.embedding_dim, device=device))  # the error is that of the weight
    weight = table.weight.detach().to(device)
    solution = solve({name: weight}, every, own.spec(), own.solver_options(), "rtn")[name]
    packed = {key: value.to(table.weight.device) for key, value in _quant_linear(table, solution).state_dict().items()}
    layer.load_state_dict(packed, assign=True)
    layer.checkpoint_format = own.checkpoint_format
    untie(model, [name])
    model.set_input_embeddings(layer)  # pyright: ignore[reportCallIssue]
    return [_report(name, solution, own, time.perf_counter() - started)]


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
        _check_storable(name, target.shape, target.config)
    return plan


def _check_storable(name: str, shape: tuple[int, int], config: QuantizeConfig) -> None:
    """Raise ValueError if no checkpoint can hold a weight (N, K)."""
    if any(size * config.bits % 32 for size in shape):
        raise ValueError(
            f"{name} has {shape[1]} inputs and {shape[0]} outputs; {config.bits}-bit "
            f"checkpoints hold multiples of {32 if config.bits == 3 else 32 // config.bits}. "
            f"Leave it in full precision with dynamic={{'-:{name}': {{}}}}"
        )


def _solve_block(
    targets: Mapping[str, _Target],
    run: Callable[..., Tensor],
    full: FullPrecision | None,
    masks: list[Tensor | None],
    ranks: Ranks,
    config: QuantizeConfig,
    method: Literal["gptq", "rtn"],
    recorder: Recorder,
    bar: Any,
) -> tuple[dict[str, QuantLinear], list[LayerReport]]:
    """Solve all layers of one block, whose floating weights are overwritten by the quantized ones."""
    packed: dict[str, QuantLinear] = {}
    reports: list[LayerReport] = []
    layers = {name: target.layer for name, target in targets.items()}
    # what runs after what may differ where tokens are routed: it is as the first process sees it
    for stage in ranks.gather(stages(layers, run))[0] if config.true_sequential else [list(targets)]:
        observer = Observer({name: layers[name] for name in stage})
        observer.watch(run, masks, ranks, full)
        groups = observer.groups({name: repr(targets[name].config) for name in stage})
        for names, solved, seconds in _solve_groups(groups, targets, observer, ranks, method, recorder, bar):
            for name in names:
                weight_of(targets[name].layer).copy_(solved[name].dequantized)
                packed[name] = _quant_linear(targets[name].layer, solved[name])
                reports.append(_report(name, solved[name], targets[name].config, seconds / len(names)))
                bar.update()
    return packed, reports


def _solve_groups(
    groups: list[list[str]],
    targets: Mapping[str, _Target],
    observer: Observer,
    ranks: Ranks,
    method: Literal["gptq", "rtn"],
    recorder: Recorder,
    bar: Any,
) -> Iterator[tuple[list[str], dict[str, Solution], float]]:
    """Solve groups of layers: their names, solutions and seconds; of several processes, each solves some."""
    shapes = [tuple(targets[name].shape for name in names) for names in groups]
    seen = Counter(shapes)

    def begin(index: int) -> tuple[list[str], Solve, float]:
        names, began = groups[index], time.perf_counter()
        own, weights = targets[names[0]].config, {name: weight_of(targets[name].layer) for name in names}
        how = observer.hessian(names[0]), own.spec(), own.solver_options(), method
        end = recorder.start(weights, *how, often=seen[shapes[index]] >= OFTEN)
        return names, end, time.perf_counter() - began

    def finish(names: list[str], end: Solve, taken: float) -> tuple[list[str], dict[str, Solution], float]:
        began = time.perf_counter()
        bar.set_postfix_str(names[0].split(".", 2)[-1])
        return names, end(), taken + time.perf_counter() - began

    if not groups:
        return
    device = weight_of(targets[groups[0][0]].layer).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the inputs are still being counted
    if ranks.group is None:  # few at once: solutions are larger than layers
        begun: deque[tuple[list[str], Solve, float]] = deque()
        for index in range(len(groups)):
            begun.append(begin(index))
            if len(begun) == LANES:
                yield finish(*begun.popleft())
        while begun:
            yield finish(*begun.popleft())
        return
    owners = ranks.owners([sum(N + K / 3 for N, K in each) * each[0][1] ** 2 for each in shapes])
    mine: dict[int, Any] = {}
    for index in range(len(groups)):
        if owners[index] == ranks.rank:
            try:
                mine[index] = finish(*begin(index))[1:]
            except ValueError as error:  # every process must hear of it
                mine[index] = error
    for index, names in enumerate(groups):
        found = ranks.share(owners[index], mine.pop(index, None), device)
        if isinstance(found, ValueError):
            raise found
        yield names, *found


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


def _matmul_rate(device: torch.device) -> float:
    """Operations per second of a float32 matrix product here, timed."""
    x = torch.ones(1024, 1024, device=device)
    float((x @ x).sum())  # warms up
    started = time.perf_counter()
    float((x @ x).sum())
    return 2 * 1024**3 / (time.perf_counter() - started)
