"""What a checkpoint is, told without building its model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import QuantizeConfig, read_config
from .files import open_files, read_tensor, shards
from .packing import PackedWeight, check_g_idx, symmetric_format, trivial_g_idx, words
from .spec import BITS, QuantSpec

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


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
    with open_files(where) as files:
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
    g_idx = read_tensor(files, f"{name}.g_idx").clamp(-1, 2**31 - 1).to(torch.int32) if "g_idx" in shapes else None
    if g_idx is not None:
        check_g_idx(g_idx, K, spec.groups(K))
    if tuple(shapes["scales"]) != (spec.groups(K), N):
        raise ValueError(f"scales has shape {tuple(shapes['scales'])}, needs {(spec.groups(K), N)}")
    qzeros = read_tensor(files, f"{name}.qzeros")
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


def _shape(files: Mapping[str, Any], key: str) -> list[int]:
    return files[key].get_slice(key).get_shape()


def _bytes(files: Mapping[str, Any], key: str) -> int:
    part = files[key].get_slice(key)
    size = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}.get(part.get_dtype())
    if size is None:
        raise ValueError(f"{key} has dtype {part.get_dtype()}")
    return size * math.prod(part.get_shape())
