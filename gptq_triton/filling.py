"""Filling a model with the tensors of a checkpoint, layer by layer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import QuantizeConfig
from .dialects import detect, load_packed
from .embedding import stand_in
from .experts import match_checkpoint
from .files import Files
from .findings import Claim, Finding, Layout
from .health import centre_findings, sample_centre
from .layers import weight_of
from .linear import QuantLinear
from .parts import PARTS, LayerParts, layer_parts

logger = logging.getLogger(__name__)


SAMPLED = 8  # layers whose codes are asked whether the label can be right
COUNTS = re.compile(r"(num|n)_.*(layers?|experts|blocks)$")  # fields that say how many modules to build
SIZES = re.compile(r".*(size|dim|dims|heads|embd|inner|positions|embeddings|rank)$")


def bare_model(folder: Path, files: Files, dtype: torch.dtype | None) -> Any:
    """The transformers model of a folder's config.json, its parameters without storage.

    Raises:
        ValueError: The config describes no model that transformers can build, or one of absurd size.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path = folder / "config.json"
    if not path.exists():  # transformers would look for it on the internet
        raise ValueError(f"{folder} is not a model folder: there is no {path}")
    try:
        _check_sizes(json.loads(path.read_text()), len(files))
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever transformers raises for fields that make no sense
        raise ValueError(f"{path} describes no model that can be built: {str(error)[:500]}") from error


def fill(
    model: nn.Module, files: Files, config: QuantizeConfig, device: torch.device, zero_points: str | None
) -> tuple[dict[str, Layout], list[Finding]]:
    """Put every tensor of the files into the model.

    Returns:
        How each layer was stored, by its name in the model, and what their codes say about the label.
    """
    found = layer_parts(files)
    place = match_checkpoint(model, files)
    own_names = {name: place[f"{name}.qweight"].removesuffix(".qweight") for name in found}
    modules, homes = dict(model.named_modules()), places(model)
    layouts, centres = {}, []
    for name, own_name in own_names.items():
        if own_name not in modules:
            raise ValueError(f"{found[name].path.name} holds {name}, which the model has no place for")
        claim = Claim.of(config, name, own_name)  # a rule may be about either name
        layouts[own_name], layer = read_layer(found[name], modules[own_name], claim, zero_points)
        if layouts[own_name].evidence == "label" and len(centres) < SAMPLED:
            centres.append((layouts[own_name].zeros, sample_centre(found[name], layouts[own_name])))
        for home in homes[id(modules[own_name])]:
            model.set_submodule(home, layer)
        layer.to(device)
    parts = {f"{name}.{part}" for name in found for part in PARTS}
    expected = model.state_dict(keep_vars=True)
    stale = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) | {r"rotary_emb\.inv_freq$"}
    for key, file in files.items():
        if key in parts:
            continue
        if place[key] not in expected:
            if any(re.search(pattern, key) for pattern in stale):
                continue
            raise ValueError(f"{file.path.name} holds {key}, which the model has no place for")
        slot = expected[place[key]]
        if file.entries[key].shape != tuple(slot.shape):
            raise ValueError(f"{key} has shape {file.entries[key].shape}, the model needs {tuple(slot.shape)}")
        owner, _, leaf = place[key].rpartition(".")
        tensor = file.read(key).to(device, slot.dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(slot, nn.Parameter) else tensor)
    return layouts, centre_findings(centres)


def read_layer(
    part: LayerParts, module: nn.Module, claim: Claim, zero_points: str | None = None
) -> tuple[Layout, QuantLinear]:
    """One layer of the files, which takes the place of a module."""
    try:
        if getattr(module, "bias", None) is not None and "bias" not in part.entries:
            raise ValueError("bias is missing")
        layout = detect(part, claim, shape=matrix_shape(module), zero_points=zero_points)
        return layout, stand_in(module, *load_packed(layout, part))
    except ValueError as error:
        raise ValueError(f"{part.path}: {part.name}: {error}") from None


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(N, K) of a layer that is, or is to be, quantized."""
    if isinstance(module, QuantLinear):
        return module.outfeatures, module.infeatures
    weight = module.weight if isinstance(module, nn.Embedding) else weight_of(module)
    return weight.shape[0], weight.shape[1]


def places(model: nn.Module) -> dict[int, list[str]]:
    """The id of every module to all names it has."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def report(source: Path, layouts: Mapping[str, Layout], others: Sequence[Finding] = ()) -> None:
    """Say what was decided, and warn of what contradicts it; layers that are alike share a line."""
    kinds: dict[tuple, list[str]] = {}
    warnings: dict[str, list[Finding]] = {}
    for name, layout in layouts.items():
        kinds.setdefault((layout.bits, layout.group_size, layout.zeros, layout.evidence), []).append(name)
        for finding in layout.findings:
            warnings.setdefault(finding.gist, []).append(finding)
    for (bits, group_size, zeros, evidence), names in kinds.items():
        logger.info(
            "%s: %d layers of %d bits, groups of %d, zero points %s by %s",
            *(source, len(names), bits, group_size, zeros, evidence),
        )
    for finding in others:
        logger.warning("%s: %s", source, finding)
    for found in warnings.values():
        more = f" and {len(found) - 1} more" if found[1:] else ""
        logger.warning("%s: %s%s: %s", source, found[0].layer, more, found[0].text)


def _check_sizes(fields: Any, tensors: int) -> None:
    """Refuse numbers that would build modules or buffers for ever, before anything is built."""
    for key, value in fields.items() if isinstance(fields, dict) else ():
        _check_sizes(value, tensors)
        if not isinstance(key, str) or not isinstance(value, (int, float)):
            continue
        if COUNTS.match(key) and value > tensors:
            raise ValueError(f"{key} is {value}, more than the checkpoint has tensors ({tensors})")
        if SIZES.match(key) and value > 2**24:
            raise ValueError(f"{key} is {value}, more than {2**24}")
