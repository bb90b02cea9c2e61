"""Quantized checkpoints: save, load, look inside.

The folder is what Hugging Face and other GPTQ readers expect: sharded safetensors, ``config.json`` with
``quantization_config``, ``quantize_config.json``, tokenizer and generation config.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import QuantizeConfig
from .experts import match_checkpoint
from .linear import QuantLinear, make_quant
from .packing import PackedWeight, check_g_idx, symmetric_format, trivial_g_idx, words
from .spec import BITS, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


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
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    if not isinstance(fields, Mapping) or not layers:
        raise ValueError("model holds no quantized layers; run quantize_model first")
    folder = check_target(folder)
    label = fields.get("checkpoint_format", "gptq")
    formats = {layer.checkpoint_format for layer in layers.values()}
    if formats != {label}:
        raise ValueError(f"layers are stored as {sorted(formats)}, the config says {label!r}")
    for name, layer in layers.items():
        if layer.infeatures * layer.bits % 32 or layer.outfeatures * layer.bits % 32:
            raise ValueError(
                f"{name} has {layer.infeatures} inputs and {layer.outfeatures} outputs, "
                f"which do not fill whole words of {layer.bits}-bit codes: no checkpoint can hold it"
            )
    about: Any = model.config
    about.quantization_config = fields = {**fields, "desc_act": any(layer.act_order for layer in layers.values())}
    with _replacing(folder) as fresh:
        model.save_pretrained(fresh, max_shard_size=max_shard_size)
        (fresh / "quantize_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)


def check_target(folder: str | Path) -> Path:
    """The absolute path of a folder that :func:`save_quantized` may write or replace.

    Raises:
        ValueError: It exists and is neither empty nor a model folder, or is the working directory.
    """
    folder = Path(folder).resolve()
    if Path.cwd().is_relative_to(folder):
        raise ValueError(f"folder {folder} is the working directory, which cannot be replaced; name another")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / "config.json").exists())):
        raise ValueError(f"folder {folder} exists and is not a model folder; it is left alone")
    return folder


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
    with _open_files(where) as files:
        wrong_label = _fill(model, where, files, quantization, device)
    if wrong_label:
        logger.warning(
            "%s says checkpoint_format %r, but the zero points of %d symmetric layers are stored the other way "
            "(first: %s); read as stored",
            folder,
            quantization.checkpoint_format,
            len(wrong_label),
            wrong_label[0],
        )
        found = {layer.checkpoint_format for layer in model.modules() if isinstance(layer, QuantLinear)}
        if len(found) == 1:
            quantization = dataclasses.replace(quantization, checkpoint_format=found.pop())
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


@dataclass(frozen=True)
class LayerInfo:
    """One quantized layer of a checkpoint.

    Attributes:
        name: Full module name.
        bits: Width.
        group_size: Rows per group; -1 for one group.
        in_features: K.
        out_features: N.
        act_order: Whether g_idx says more than "groups in order".
        dialect: "v1" or "v2".
        evidence: Why: "tensors" (symmetric zero points prove it) or "label".
        bytes: Size of its tensors.
    """

    name: str
    bits: int
    group_size: int
    in_features: int
    out_features: int
    act_order: bool
    dialect: str
    evidence: str
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: The folder.
        checkpoint_format: As labelled.
        config: As read from its config files.
        layers: The quantized layers.
        bytes: Size of all tensor files.
        findings: What looks wrong, one sentence each.
    """

    path: str
    checkpoint_format: str
    config: dict[str, Any]
    layers: list[LayerInfo]
    bytes: int
    findings: list[str] = field(default_factory=list)


def inspect_checkpoint(folder: str | Path) -> Inspection:
    """Describe a GPTQ folder without building its model; reads headers, zero points and g_idx only.

    Raises:
        ValueError: There is no GPTQ checkpoint of a known format.
    """
    folder = Path(folder)
    config = read_config(folder)
    where = shards(folder)
    layers, findings = [], []
    names = sorted(key.removesuffix(".qweight") for key in where if key.endswith(".qweight"))
    if not names:
        raise ValueError(f"{folder} holds no quantized layers (no tensor ends in .qweight)")
    with _open_files(where) as files:
        for name in names:
            try:
                layers.append(_inspect_layer(name, files, config))
            except ValueError as error:
                findings.append(f"{name}: {error}")
    told = {"gptq": "v1", "gptq_v2": "v2"}[config.checkpoint_format]
    wrong = [layer.name for layer in layers if layer.dialect != told]
    if wrong:
        findings.append(f"labelled {config.checkpoint_format!r}, but {len(wrong)} layers are stored the other way")
    return Inspection(
        path=str(folder),
        checkpoint_format=config.checkpoint_format,
        config=config.to_dict(),
        layers=layers,
        bytes=sum(path.stat().st_size for path in set(where.values())),
        findings=findings,
    )


def read_config(folder: Path) -> QuantizeConfig:
    """The quantization config of a folder, from ``config.json`` or ``quantize_config.json``.

    Raises:
        ValueError: Neither file has one, or it is not of a GPTQ checkpoint this package reads.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    fields: dict[str, Any] = {}
    for name in ("quantize_config.json", "config.json"):  # the latter wins
        if (folder / name).exists():
            try:
                content = json.loads((folder / name).read_text())
            except ValueError as error:
                raise ValueError(f"{folder / name} is not valid JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(f"{folder / name} must hold a JSON object, got {content!r}")
            own = (content.get("quantization_config") or {}) if name == "config.json" else content
            if not isinstance(own, dict):
                raise ValueError(f"quantization_config in {folder / name} must be a JSON object, got {own!r}")
            fields |= own
    if not fields:
        raise ValueError(f"{folder} has no quantization_config in config.json and no quantize_config.json")
    return QuantizeConfig.from_dict(fields)


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name to the file that holds it.

    Raises:
        ValueError: There is no safetensors file, one is malformed, or the index names a file outside.
    """
    if (folder / INDEX).exists():
        try:
            names = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX} is not a shard index: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not a file of this folder")
        files = [folder / name for name in sorted(names)]
    elif (folder / "model.safetensors").exists():  # others beside it are of another making, as LoRA adapters
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file")
    where: dict[str, Path] = {}
    for path in files:
        with _opened(path) as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                if key in where:
                    raise ValueError(f"{key} is in both {where[key].name} and {path.name}")
                where[key] = path
    return where


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of one safetensors file."""
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file: the whole of it or nothing."""
    with _renamed(path) as fresh:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, fresh, metadata=dict(metadata))


def atomic_write(path: Path, text: str) -> None:
    """Write one text file: the whole of it or nothing."""
    with _renamed(path) as fresh:
        fresh.write_text(text)


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
        rules = (config.for_module(name), config.for_module(own_name))  # a rule may be about either name
        own = next((rule for rule in rules if rule not in (None, config)), config)
        kinds.setdefault((own.bits, own.group_size), []).append(own_name)
        sym[name] = own.sym
    for (bits, group_size), names in kinds.items():
        make_quant(model, names, bits, group_size, device="meta", checkpoint_format=config.checkpoint_format)
    wrong_label = []
    for name, own_name in layers.items():
        layer = cast("QuantLinear", model.get_submodule(own_name))
        tensors = {part: _read(files, f"{name}.{part}") for part in PARTS if f"{name}.{part}" in where}
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
        tensor, slot = _read(files, key), expected[place[key]]
        if tensor.shape != slot.shape:
            raise ValueError(f"{key} has shape {tuple(tensor.shape)}, the model needs {tuple(slot.shape)}")
        owner, _, leaf = place[key].rpartition(".")
        tensor = tensor.to(device, slot.dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor) if isinstance(slot, nn.Parameter) else tensor)
    return wrong_label


def _inspect_layer(name: str, files: Mapping[str, Any], config: QuantizeConfig) -> LayerInfo:
    shapes = {part: _shape(files, f"{name}.{part}") for part in PARTS if f"{name}.{part}" in files}
    for part in PARTS[:3]:
        if part not in shapes:
            raise ValueError(f"{part} is missing")
        if len(shapes[part]) != 2:
            raise ValueError(f"{part} must be a matrix, got shape {tuple(shapes[part])}")
    own = config.for_module(name) or config
    rows, N = shapes["qweight"]
    bits = own.bits
    K = shapes["g_idx"][0] if "g_idx" in shapes else rows * 32 // bits
    if words(K, bits) != rows:
        told = [b for b in BITS if words(K, b) == rows]
        raise ValueError(f"config says {bits} bits, but {rows} words for {K} inputs mean {told or 'none'}")
    spec = QuantSpec(bits, own.group_size, own.sym, own.desc_act)
    g_idx = _read(files, f"{name}.g_idx").clamp(-1, 2**31 - 1).to(torch.int32) if "g_idx" in shapes else None
    if g_idx is not None:
        check_g_idx(g_idx, K, spec.groups(K))
    if tuple(shapes["scales"]) != (spec.groups(K), N):
        raise ValueError(f"scales has shape {tuple(shapes['scales'])}, needs {(spec.groups(K), N)}")
    qzeros = _read(files, f"{name}.qzeros")
    if tuple(qzeros.shape) != (spec.groups(K), words(N, bits)):
        raise ValueError(f"qzeros has shape {tuple(qzeros.shape)}, needs {(spec.groups(K), words(N, bits))}")
    empty = torch.empty(0, N, dtype=torch.int32)
    proven = symmetric_format(PackedWeight(empty, empty, qzeros, None, spec, K)) if own.sym else None
    return LayerInfo(
        name=name,
        bits=bits,
        group_size=own.group_size,
        in_features=K,
        out_features=N,
        act_order=g_idx is not None and not torch.equal(g_idx, trivial_g_idx(K, own.group_size)),
        dialect={"gptq": "v1", "gptq_v2": "v2"}[proven or config.checkpoint_format],
        evidence="tensors" if proven else "label",
        bytes=sum(_bytes(files, f"{name}.{part}") for part in shapes),
    )


@contextmanager
def _open_files(where: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    """Tensor name to the open file that holds it. Opening reads the names of all tensors, so it is done once."""
    with ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path)) for path in sorted(set(where.values()))}
        yield {key: files[path] for key, path in where.items()}


def _read(files: Mapping[str, Any], key: str) -> Tensor:
    return files[key].get_tensor(key)


def _shape(files: Mapping[str, Any], key: str) -> list[int]:
    return files[key].get_slice(key).get_shape()


def _bytes(files: Mapping[str, Any], key: str) -> int:
    part = files[key].get_slice(key)
    size = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(part.get_dtype())
    if size is None:
        raise ValueError(f"{key} has dtype {part.get_dtype()}")
    return size * math.prod(part.get_shape())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    with opened as file:
        yield file


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to path if all goes well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    fresh = Path(name)
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the target, swapped in if all goes well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    fresh, old = beside / "new", beside / "old"
    try:
        fresh.mkdir()
        yield fresh
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(beside, ignore_errors=True)
