"""Quantized checkpoints: save, load, look inside.

The folder is what Hugging Face and other GPTQ readers expect: sharded safetensors, ``config.json`` with
``quantization_config``, ``quantize_config.json``, tokenizer and generation config.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .atomic import check_target, replacing, unreplaced
from .config import read_config
from .files import open_checkpoint
from .filling import bare_model, fill, places, read_layer, report
from .findings import Claim, corrected, file_claim
from .fusing import stored_layers
from .linear import QuantLinear
from .packing import zero_offset
from .parts import PARTS, layer_parts
from .spec import QuantSpec
from .zeros import FORM_OF_LABEL, convert_zeros, wrapped_fields

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

    Everything is written beside the target and put in its place by one system call: ``folder`` is at
    every moment absent, the old one or the new one, and an existing one is replaced whole. All zero points
    are written in one form: v1 where every layer holds them so, but v2 where one of them is 0, for which v1
    has no agreed form.

    Args:
        model: Quantized by :func:`gptq_triton.quantize_model` or loaded by :func:`load_quantized`.
        folder: Target; its parent must exist or be creatable.
        tokenizer: Saved beside the model.
        max_shard_size: Largest size of one file.

    Raises:
        ValueError: The model is not quantized, a layer has no place in a checkpoint, or ``folder`` is
            something that must not be replaced.
        OSError: It cannot be written, as when the disk is full; what was there is untouched.
    """
    fields: Any = getattr(model.config, "quantization_config", None)
    if hasattr(fields, "to_dict"):  # as transformers keeps it
        fields = fields.to_dict()
    layers = stored_layers(model)
    if not isinstance(fields, Mapping) or not layers:
        raise ValueError("model holds no quantized layers; run quantize_model first")
    folder = check_target(folder)
    state, label = storable_state(model, layers)
    about: Any = model.config
    about.quantization_config = fields = {
        **fields,
        "desc_act": any(layer.act_order for layer in layers.values()),
        "checkpoint_format": label,
    }
    if "format" in fields:  # GPTQModel writes it under both names
        fields["format"] = label
    try:
        with replacing(folder) as fresh:
            model.save_pretrained(fresh, state_dict=state, max_shard_size=max_shard_size)
            (fresh / "quantize_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
    except (OSError, SafetensorError) as error:  # the latter hides an OSError in its text
        raise OSError(f"{folder} could not be written, and is as it was: {error}") from error


def storable_state(model: nn.Module, layers: Mapping[str, QuantLinear]) -> tuple[dict[str, Tensor], str]:
    """The state dict of a model as a checkpoint holds it, all zero points in one form, and that form's label.

    Raises:
        ValueError: A layer has no place in a checkpoint.
    """
    for name, layer in layers.items():
        if layer.infeatures * layer.bits % 32 or layer.outfeatures * layer.bits % 32:
            raise ValueError(
                f"{name} has {layer.infeatures} inputs and {layer.outfeatures} outputs, "
                f"which do not fill whole words of {layer.bits}-bit codes: no checkpoint can hold it"
            )
    state = model.state_dict()
    label = _label(layers, state)
    for name, layer in layers.items():
        old, key = FORM_OF_LABEL[layer.checkpoint_format], f"{name}.qzeros"
        state[key] = convert_zeros(state[key], layer.bits, layer.outfeatures, old, FORM_OF_LABEL[label])
    return state, label


def load_quantized(
    folder: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    zero_points: str | None = None,
) -> PreTrainedModel:
    """Load a GPTQ folder into :class:`QuantLinear` layers.

    The model is built without storage and filled layer by layer, so that memory peaks at the packed
    model plus one layer. The tensors decide how they are to be read (:mod:`gptq_triton.dialects`); where
    they contradict the config, a warning says what was decided and why, and the model carries a config
    that is right.

    Args:
        folder: As :func:`save_quantized`, AutoGPTQ, GPTQModel or transformers wrote it: safetensors or
            ``.bin``/``.pt`` files, of which only tensors are read.
        device: Default: the GPU if there is one.
        dtype: Of what is not quantized; default: as saved. Codes and scales stay as they are.
        zero_points: "v1", "v2" or "v1-words": how zero points are stored, whatever the evidence says.

    Raises:
        ValueError: A file, tensor or field is missing, surplus or malformed, or the format is another
            than GPTQ; the message names it.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with unreplaced(folder):
        quantization = read_config(folder)
        with open_checkpoint(folder) as files:
            layer_parts(files)  # refuses a folder without quantized layers before anything is built
            model = bare_model(folder, files, dtype)
            layouts, doubts = fill(model, files, quantization, device, zero_points)
        if (folder / "generation_config.json").exists():
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:
                raise ValueError(f"{folder / 'generation_config.json'} is not a generation config: {error}") from None
    report(folder, layouts, doubts)
    formats = {layer.checkpoint_format for layer in model.modules() if isinstance(layer, QuantLinear)}
    label = formats.pop() if len(formats) == 1 else "gptq_v2"  # one label for all, as it will be saved
    quantization = dataclasses.replace(corrected(quantization, layouts), checkpoint_format=label)
    model.tie_weights()
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer._parameters.pop("weight", None)  # the embedding's, tied to a quantized head
    left = [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]
    if left:
        raise ValueError(f"{folder} lacks {len(left)} tensors the model needs: {', '.join(left[:5])}")
    model.to(device)  # buffers that no file holds (rotary frequencies)
    model.config.quantization_config = quantization.to_dict()
    return model.eval()


def load_quant(
    model: nn.Module,
    checkpoint: str | Path,
    wbits: int | None = None,
    groupsize: int | None = None,
    checkpoint_format: str | None = None,
) -> nn.Module:
    """Load one GPTQ-for-LLaMa, ColossalAI or AutoGPTQ file into a floating model, in place.

    Args:
        model: With floating layers where the file has quantized ones.
        checkpoint: A ``.safetensors`` file, or a ``.pt``/``.pth``/``.bin`` one, of which only tensors
            are read.
        wbits: 2, 3, 4 or 8; default: what the tensors hold, which may differ between layers.
        groupsize: Rows per group, -1 for all of them; default: what the tensors hold.
        checkpoint_format: "gptq" or "gptq_v2", how asymmetric zero points are stored (symmetric ones tell
            by themselves); default: what the file's metadata says, else "gptq".

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: The file is not readable as tensors, or holds no quantized layers, or not those of
            this model, or of another width or group size than asked for, or other tensors are missing,
            surplus or misshapen. The model is then as it was.
    """
    path = Path(checkpoint)
    if (wbits is None) != (groupsize is None):
        raise ValueError(f"wbits and groupsize go together, got {wbits} and {groupsize}")
    with open_checkpoint(path) as files:
        names = layer_parts(files)
        label = checkpoint_format or file_claim(next(iter(names.values())).metadata).label
        zero_offset(label)
        modules = dict(model.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            raise ValueError(f"{path} quantizes layers that the model does not have: {', '.join(unknown)}")
        claim, found, layouts = Claim(wbits, groupsize, None, label), {}, {}
        for name, part in names.items():
            layouts[name], found[name] = read_layer(part, modules[name], claim)
            own = layouts[name].spec
            if wbits is not None and groupsize is not None:
                asked = QuantSpec(wbits, groupsize)
                if (own.bits, own.groups(layouts[name].K)) != (wbits, asked.groups(layouts[name].K)):
                    raise ValueError(
                        f"{name} has {own.bits} bits and groups of {own.group_size}, "
                        f"asked for were {wbits} and {groupsize}"
                    )
        parts = {f"{name}.{part}" for name in names for part in PARTS}
        rest = {key: file.read(key) for key, file in files.items() if key not in parts}
    homes = places(model)
    replaced = {id(modules[name]): found[name] for name in names}
    inside = tuple(f"{home}." for key in replaced for home in homes[key])
    slots = {key: slot for key, slot in model.state_dict().items() if not key.startswith(inside)}
    for what, keys in (("lacks", slots.keys() - rest.keys()), ("holds surplus", rest.keys() - slots.keys())):
        if keys:
            raise ValueError(f"{path} {what} {len(keys)} tensors: {', '.join(sorted(keys)[:5])}")
    for key, slot in slots.items():
        if rest[key].shape != slot.shape:
            raise ValueError(f"{path}: {key} has shape {tuple(rest[key].shape)}, the model needs {tuple(slot.shape)}")
    report(path, layouts)
    for old, layer in replaced.items():  # only now: a file that does not fit leaves the model as it was
        device = next(iter(model.get_submodule(homes[old][0]).parameters())).device
        for home in homes[old]:
            model.set_submodule(home, layer.to(device))
    model.load_state_dict(rest, strict=False)
    return model.eval()


def _label(layers: Mapping[str, QuantLinear], state: Mapping[str, Tensor]) -> str:
    """The format in which the zero points of all layers can be written."""
    formats = {layer.checkpoint_format for layer in layers.values()}
    if formats != {"gptq"}:
        return "gptq_v2"
    doubtful = [n for n, m in layers.items() if wrapped_fields(state[f"{n}.qzeros"], m.bits, m.outfeatures)]
    if doubtful:
        logger.warning(
            "%s%s: zero points of 0, for which v1 has no agreed form; all are written as v2",
            doubtful[0],
            f" and {len(doubtful) - 1} more" if doubtful[1:] else "",
        )
    return "gptq_v2" if doubtful else "gptq"
