"""Mixture-of-experts models: fused experts taken apart into linear layers, which GPTQ can quantize.

transformers holds all experts of a block in one module with 3-D weights; published GPTQ checkpoints
hold one layer per expert and projection.

Source: transformers ``integrations/moe.py`` (what fused experts compute, and in which layouts) and
``conversion_mapping.py`` (what each architecture's checkpoints call the layers).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Experts(nn.ModuleList):
    """The experts of one block: per expert, linear layers under the names that checkpoints use.

    Stands for the fused module it is made from, which it leaves without weights. The result is
    accumulated in float32 at least.

    Args:
        fused: transformers' module, of a layout that :func:`unfuse` accepts.
        inner: Names of the projections into an expert: gate and up, or up alone.
        outer: Name of the projection out of an expert.
    """

    def __init__(self, fused: nn.Module, inner: tuple[str, ...], outer: str):
        source: Any = fused
        self.inner, self.outer = inner, outer
        # bound methods, because a module would count as one more expert
        self.activation = source._apply_gate if source.has_gate else source.act_fn.forward
        into = source.gate_up_proj if source.has_gate else source.up_proj
        names = (*inner, outer)
        pieces = [(*up.chunk(len(inner)), down) for up, down in zip(into, source.down_proj, strict=True)]
        super().__init__(nn.ModuleDict(dict(zip(names, map(_linear, piece), strict=True))) for piece in pieces)
        for name, _ in list(fused.named_parameters(recurse=False)):
            delattr(fused, name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: (T, H), floating.
            top_k_index: (T, k), int64; an index past the last expert stands for none.
            top_k_weights: (T, k), floating.

        Returns:
            (T, H), the dtype of hidden_states.
        """
        y = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
        chosen = top_k_index.flatten()
        counts = chosen.bincount(minlength=len(self)).tolist()
        groups = chosen.argsort(stable=True).split(counts)
        weights = top_k_weights.flatten()
        experts: Any = zip(self, groups, strict=False)
        for expert, rows in experts:
            if len(rows):
                token = rows // top_k_index.shape[1]
                x = hidden_states[token]  # one tensor for gate and up, which then share a Hessian
                inside = self.activation(torch.cat([expert[name](x) for name in self.inner], -1))
                y.index_add_(0, token, (expert[self.outer](inside) * weights[rows, None]).to(y.dtype))
        return y.to(hidden_states.dtype)


def unfuse(model: nn.Module, skip: Callable[[str], bool] = lambda name: False) -> None:
    """Replace every module of fused experts in a transformers model by :class:`Experts`, in place.

    Needs memory for one block's experts more than the model. Works on the meta device.

    Args:
        model: A transformers model.
        skip: Whether to leave a module alone, by its full name.

    Raises:
        ValueError: Experts are of a layout that cannot be taken apart. Nothing is changed then.
    """
    found = {name: m for name, m in model.named_modules() if is_fused(m) and not skip(name)}
    for name, module in found.items():
        _check(name, module)
    if not found:
        return
    converters = _conversions(model)[1]
    for name in list(found):
        module: Any = found.pop(name)
        inner = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
        inner = _leaves(converters, f"{name}.{'gate_up_proj' if module.has_gate else 'up_proj'}") or inner
        outer = _leaves(converters, f"{name}.down_proj") or ("down_proj",)
        model.set_submodule(name, Experts(module, inner, *outer))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts in one tensor."""
    own = {name for name, weight in module.named_parameters(recurse=False) if weight.dim() == 3}
    return "down_proj" in own or (bool(own) and type(module).__name__.endswith("Experts"))


def routers(model: nn.Module) -> set[str]:
    """Names of the linear layers that choose experts or weigh a shared one.

    They are tiny and decide much; published checkpoints keep them in full precision.
    """
    found = set()
    for path, block in model.named_modules():
        experts: Any = next((m for m in block.children() if isinstance(m, Experts) or is_fused(m)), None)
        if experts is None:
            continue
        sizes = (1, len(experts) if isinstance(experts, Experts) else len(next(experts.parameters())))
        for owner_path, owner in [(path, block), *((f"{path}.{name}", m) for name, m in block.named_children())]:
            linears = {f"{owner_path}.{name}": m for name, m in owner.named_children() if isinstance(m, nn.Linear)}
            if owner is block or len(linears) == 1:  # a module with more of them is an MLP
                found |= {name for name, layer in linears.items() if layer.out_features in sizes}
    return found


@contextmanager
def ignoring(module: nn.Module, mask: Tensor | None) -> Iterator[None]:
    """While active, tokens whose mask (B, S) is False reach no expert, so that padding is not counted."""

    if mask is None:
        yield
        return
    padding = ~mask.reshape(-1, 1)

    def drop(experts: Any, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden_states, index, weights = args
        return hidden_states, index.masked_fill(padding, len(experts)), weights

    with ExitStack() as hooks:
        for experts in module.modules():
            if isinstance(experts, Experts):
                hooks.callback(experts.register_forward_pre_hook(drop).remove)
        yield


def skeleton(model: nn.Module, skip: Callable[[str], bool] = lambda name: False) -> nn.Module:
    """A copy after :func:`unfuse` whose parameters take no memory."""
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    bare = copy.deepcopy(model, empty)
    unfuse(bare, skip)
    return bare


def match_checkpoint(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Make a model's modules fit the tensor names of a checkpoint, and say which tensor goes where.

    Args:
        model: Usually on the meta device. Fused experts are taken apart unless the checkpoint has them fused.
        keys: Names in the checkpoint, which may be older than those in the model (``block_sparse_moe``
            for ``mlp`` in Mixtral).

    Returns:
        Name in the checkpoint to name in the model.

    Raises:
        ValueError: Two tensors have the same place, or experts cannot be taken apart.
    """
    renamings = _conversions(model)[0]
    names = {}
    for key in sorted(keys):
        names[key] = key
        for renaming in renamings:
            names[key] = renaming.rename_source_key(names[key])[0]
    places = set(names.values())
    unfuse(model, skip=lambda name: f"{name}.down_proj" in places)
    modules = dict(model.named_modules())
    names = {key: name if name.rpartition(".")[0] in modules else key for key, name in names.items()}
    if len(set(names.values())) < len(names):
        owners = {name: key for key, name in names.items()}
        twice = next(key for key, name in names.items() if owners[name] != key)
        raise ValueError(f"{twice} and {owners[names[twice]]} are both {names[twice]} of the model")
    return names


def _check(name: str, module: Any) -> None:
    """Raise ValueError unless the fused experts are plain: concatenated, not transposed, no bias or norm."""
    into = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    shapes = {key: tuple(tensor.shape) for key, tensor in [*module.named_parameters(), *module.named_buffers()]}
    if not hasattr(module, "is_transposed"):
        reason = "they do not follow transformers' experts interface"
    elif module.is_transposed:
        reason = "their weights are transposed"
    elif not module.is_concatenated:
        reason = "their gate and up rows are interleaved"
    elif getattr(module, "has_post_expert_norm", False) or set(shapes) != {into, "down_proj"}:
        reason = f"they hold {', '.join(sorted(shapes))}, not just {into} and down_proj"
    else:
        E, N, K = shapes["down_proj"]
        wanted = (E, 2 * K if into == "gate_up_proj" else K, N)
        if shapes[into] == wanted:
            return
        reason = f"{into} has shape {shapes[into]}, down_proj needs {wanted}"
    raise ValueError(
        f"{name} ({type(module).__name__}): these fused experts cannot be taken apart into linear layers: {reason}. "
        f"Leave them in full precision with dynamic={{'-:.*{re.escape(name.rpartition('.')[2])}': {{}}}}"
    )


def _linear(weight: Tensor) -> nn.Linear:
    """A layer around a copy of one expert's weight (N, K)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return layer


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and weight converters from this model's checkpoints, in order."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    if not isinstance(model, PreTrainedModel):
        return [], []
    steps = get_model_conversion_mapping(model, add_legacy=False)
    return [s for s in steps if isinstance(s, WeightRenaming)], [s for s in steps if isinstance(s, WeightConverter)]


def _leaves(converters: Iterable[Any], name: str) -> tuple[str, ...]:
    """What checkpoints call an expert's layers that became this fused tensor; () if they hold it fused."""
    for converter in converters:
        sources = [source.partition("experts.*.")[2].removesuffix(".weight") for source in converter.source_patterns]
        if all(sources) and converter.reverse_transform().rename_source_key(name)[1] is not None:
            return tuple(sources)
    return ()
