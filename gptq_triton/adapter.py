"""A LoRA adapter as PEFT saves it: which layers it changes, and by what.

Source: PEFT's ``LoraConfig`` and ``LoraLayer``: the change of a weight (N, K) is ``B @ A * alpha / r``
(``alpha / sqrt(r)`` with ``use_rslora``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import read_tensors

PREFIX = "base_model.model."
KEY = re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Fields that change what an adapter means, and what they must be for B @ A to be all of it.
PLAIN = {"use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "layer_replication": None}
PLAIN |= {
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
}
# Initialisations that take the adapter's start out of the base weight, which a checkpoint does not know of.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one weight: ``B @ A * scaling``, with A (r, K) and B (N, r)."""

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The r of both factors."""
        return self.A.shape[0]

    def delta(self, device: torch.device) -> Tensor:
        """The change itself, float32 (N, K)."""
        return (self.B.to(device).float() @ self.A.to(device).float()).mul_(self.scaling)


def read_adapter(folder: str | Path) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """A PEFT folder (``adapter_config.json`` and ``adapter_model.safetensors`` or ``.bin``).

    Returns:
        The change of each layer by name, and the base model's own weights that PEFT saved along (it does so
        for the embedding and the head when one of them is adapted), by their names in the base model.

    Raises:
        ValueError: A file is missing or damaged, or the adapter is not plain LoRA on linear layers.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not an adapter's config: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: peft_type must be 'LORA', got {str(kind)[:50]!r}")
    for field, plain in PLAIN.items():
        if config.get(field) not in (plain, None, [], {}):
            raise ValueError(f"{path}: {field} must be {plain!r} for a merge, got {config[field]!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ValueError(f"{path}: init_lora_weights is {start!r}, which changed the base weights too")
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin") if (folder / name).exists()]
    if not files:
        raise ValueError(f"{folder} has no adapter_model.safetensors and no adapter_model.bin")
    factors: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in read_tensors(files[0])[0].items():
        name = key.removeprefix(PREFIX)
        if found := KEY.fullmatch(name):
            if tensor.dim() != 2 or not tensor.is_floating_point():
                raise ValueError(f"{files[0]}: {key} must be a floating matrix")
            factors.setdefault(found["name"], {})[found["part"]] = tensor
        elif ".lora_" in name:
            raise ValueError(f"{files[0]}: {key} is no factor of a linear layer's LoRA; nothing else can be merged")
        else:
            copies[name.replace(".base_layer.", ".")] = tensor
    if not factors:
        raise ValueError(f"{files[0]} holds no LoRA factors")
    return {name: _low_rank(files[0], name, pair, config) for name, pair in factors.items()}, copies


def _low_rank(path: Path, name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"{path}: {name} has only lora_{next(iter(pair))}")
    A, B = pair["A"], pair["B"]
    if A.shape[0] != B.shape[1] or not A.shape[0]:
        raise ValueError(f"{path}: {name} has lora_A of shape {tuple(A.shape)} and lora_B of shape {tuple(B.shape)}")
    if not bool(torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise ValueError(f"{path}: {name} must be finite, got NaN or infinity")
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ValueError(f"{path.parent / 'adapter_config.json'}: lora_alpha must be a number, got {alpha!r}")
    return LowRank(A, B, alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0]))
