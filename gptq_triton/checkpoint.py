"""Quantized checkpoints: save, load, look inside.

The folder is what Hugging Face and other GPTQ readers expect: sharded safetensors, ``config.json`` with
``quantization_config``, ``quantize_config.json``, tokenizer and generation config.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .config import QuantizeConfig, read_config
from .embedding import make_layers
from .experts import match_checkpoint
from .files import check_target, open_files, read_tensor, read_tensors, replacing, shards
from .inspection import PARTS
from .linear import QuantLinear, make_quant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def save_quantized(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a quantized model as a Hugging Face GPTQ folder.

    Everything is written beside the target and renamed at the end: ``folder`` is at every moment
    absent, the old one or the new one, and an existing one is replaced whole.

    Args:
        model: Quantized by :func:`gptq_triton.quantize_model` or loaded by :func:`load_quantized`.
        folder: Target; its parent must exist or be creatable.
        tokenizer: Saved beside the model.
        max_shard_size: Largest size of one file.

    Raises:
        ValueError: The model is not quantized, a layer has no place in a checkpoint, or ``folder`` is
            something that must not be replaced.
    """
    fields = getattr(model.config, "quantization_config", None)
    if hasattr(fields, "to_dict"):  # as transformers keeps it
        fields = cast("Any", fields).to_dict()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not isinstance(fields, Mapping) or not layers:
        raise ValueError("model holds no quantized layers; run quantize_model first")
    folder = check_target(folder)
    label = fields.get("checkpoint_format", "gptq")
    formats = {layer.checkpoint_format for layer in layers.values()}
    if formats != {label}:
        raise ValueError(f"layers are stored as {sorted(formats)}, the config says {label!r}")
    check_storable(layers)
    about: Any = model.config
    about.quantization_config = fields = {**fields, "desc_act": any(layer.act_order for layer in layers.values())}
    with replacing(folder) as fresh:
        model.save_pretrained(fresh, max_shard_size=max_shard_size)
        (fresh / "quantize_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)


def check_storable(layers: Mapping[str, QuantLinear]) -> None:
    """Refuse layers that no checkpoint can hold.

    Raises:
        ValueError: Codes or zero points do not fill whole words.
    """
    for name, layer in layers.items():
        if layer.infeatures * layer.bits % 32 or layer.outfeatures * layer.bits % 32:
            raise ValueError(
                f"{name} has {layer.infeatures} inputs and {layer.outfeatures} outputs, "
                f"which do not fill whole words of {layer.bits}-bit codes: no checkpoint can hold it"
            )


def load_quantized(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a GPTQ folder into :class:`QuantLinear` layers.

    The model is built without storage and filled layer by layer, so that memory peaks at the packed
    model plus one layer.

    Args:
        folder: As :func:`save_quantized`, AutoGPTQ, GPTQModel or transformers wrote it (v1 or v2).
        device: Default: the GPU if there is one.
        dtype: Of what is not quantized; default: as saved. Codes, scales and zero points stay as they are.

    Raises:
        ValueError: A file, tensor or field is missing, surplus or malformed, or the format is another
            than GPTQ v1 or v2; the message names it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = Path(folder)
    quantization = read_config(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    where = shards(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or config.dtype or torch.float32)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with open_files(where) as files:
        wrong_label = _fill(model, where, files, quantization, device)
    quantization = relabelled(quantization, model, wrong_label, folder)
    model.tie_weights()
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer._parameters.pop("weight", None)  # the embedding's, tied to a quantized head
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if left:
        raise ValueError(f"{folder} lacks {len(left)} tensors the model needs: {', '.join(left[:5])}")
    model.to(device)  # buffers that no file holds (rotary frequencies)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.quantization_config = quantization.to_dict()
    return model.eval()


def stored_as(config: QuantizeConfig, *names: str) -> QuantizeConfig:
    """The configuration of a layer that a checkpoint holds quantized; a rule may be about any of its names."""
    rules = (config.for_module(name) for name in names)
    return next((rule for rule in rules if rule not in (None, config)), config)


def relabelled(
    config: QuantizeConfig, model: nn.Module, wrong_label: Sequence[str], source: str | Path
) -> QuantizeConfig:
    """The configuration with the checkpoint format that the tensors prove, after a warning if it is another."""
    if not wrong_label:
        return config
    logger.warning(
        "%s says checkpoint_format %r, but the zero points of %d symmetric layers are stored the other way "
        "(first: %s); read as stored",
        source,
        config.checkpoint_format,
        len(wrong_label),
        wrong_label[0],
    )
    found = {layer.checkpoint_format for layer in model.modules() if isinstance(layer, QuantLinear)}
    return dataclasses.replace(config, checkpoint_format=found.pop()) if len(found) == 1 else config


def load_quant(
    model: nn.Module, checkpoint: str | Path, wbits: int, groupsize: int, checkpoint_format: str = "gptq"
) -> nn.Module:
    """Load one GPTQ-for-LLaMa or ColossalAI file into a floating model, in place.

    Args:
        model: With floating layers where the file has quantized ones.
        checkpoint: A ``.safetensors`` file, or a ``.pt``/``.pth``/``.bin`` one, of which only tensors
            are read.
        wbits: 2, 3, 4 or 8.
        groupsize: Rows per group; -1 for all of them.
        checkpoint_format: How asymmetric zero points are stored; symmetric ones tell by themselves.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: The file is not readable as tensors, or holds no quantized layers, or not those of
            this model.
        RuntimeError: Tensors are missing, surplus or misshapen (as ``load_state_dict`` says it).
    """
    path = Path(checkpoint)
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a readable file of tensors alone: {error}") from None
        if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise ValueError(f"{path} must hold one dict of names to tensors")
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if not names:
        raise ValueError(f"{path} holds no quantized layers (no key ends in .qweight)")
    make_quant(model, names, wbits, groupsize, checkpoint_format=checkpoint_format)
    model.load_state_dict(tensors)
    return model.eval()


def _fill(
    model: nn.Module,
    where: Mapping[str, Path],
    files: Mapping[str, Any],
    config: QuantizeConfig,
    device: torch.device,
) -> list[str]:
    """Put every tensor of the files into the model; returns the layers whose label was wrong."""
    quantized = [key.removesuffix(".qweight") for key in where if key.endswith(".qweight")]
    if not quantized:
        raise ValueError("the checkpoint holds no quantized layers (no tensor ends in .qweight)")
    place = match_checkpoint(model, where)
    layers = {name: place[f"{name}.qweight"].removesuffix(".qweight") for name in quantized}
    kinds: dict[tuple[int, int], list[str]] = {}
    sym: dict[str, bool] = {}
    for name, own_name in layers.items():
        own = stored_as(config, name, own_name)
        kinds.setdefault((own.bits, own.group_size), []).append(own_name)
        sym[name] = own.sym
    for (bits, group_size), names in kinds.items():
        make_layers(model, names, bits, group_size, device="meta", checkpoint_format=config.checkpoint_format)
    wrong_label = []
    for name, own_name in layers.items():
        layer = cast("QuantLinear", model.get_submodule(own_name))
        tensors = {part: read_tensor(files, f"{name}.{part}") for part in PARTS if f"{name}.{part}" in where}
        if layer.bias is not None and "bias" not in tensors:
            raise ValueError(f"{name}.bias is missing")
        try:
            layer.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from None
        if not sym[name]:  # its zero points prove nothing
            layer.checkpoint_format = config.checkpoint_format
        layer.to(device)
        if layer.checkpoint_format != config.checkpoint_format:
            wrong_label.append(name)
    parts = {f"{name}.{part}" for name in layers for part in PARTS}
    expected = model.state_dict(keep_vars=True)
    stale = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) | {r"rotary_emb\.inv_freq$"}
    for key in where:
        if key in parts:
            continue
        if place[key] not in expected:
            if any(re.search(pattern, key) for pattern in stale):
                continue
            raise ValueError(f"{where[key].name} holds {key}, which the model has no place for")
        tensor, slot = read_tensor(files, key), expected[place[key]]
        if tensor.shape != slot.shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, the model needs {tuple(slot.shape)}")
        owner, _, leaf = place[key].rpartition(".")
        tensor = tensor.to(device, slot.dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(slot, nn.Parameter) else tensor)
    return wrong_label
