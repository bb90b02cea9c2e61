"""QuantizeConfig: what to do to a model, and what a checkpoint's config files say was done.

Source of the file fields: AutoGPTQ (``quantize_config.json``), transformers' ``GPTQConfig`` and
GPTQModel (``config.json: quantization_config``, ``dynamic``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .atomic import mend
from .options import check_refinement
from .packing import zero_offset
from .solver import SolverOptions
from .spec import QuantSpec

logger = logging.getLogger(__name__)

SYNONYMS = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "format": "checkpoint_format",
    "act_group_aware": "group_aware",
}
# Formats that carry the same tensor names and mean something else.
REFUSED_FORMATS = {
    "gptq_p": "GPTQModel's planar bit layout",
    "marlin": "the Marlin kernel layout",
    "bitblas": "the BitBLAS kernel layout",
    "awq": "AWQ",
    "gemm": "AWQ",
    "gemv": "AWQ",
}


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: Input rows per group; -1 for all of them.
        sym: Fixed zero points in the middle of the range.
        desc_act: Act-order: round columns by falling activation energy, and let groups follow that order.
        static_groups: Groups found on the original weights; keeps groups in order under act-order.
        group_aware: Without ``desc_act``, round groups and columns inside them by falling energy.
        damp_percent: Damping of the Hessian, as a fraction of its mean diagonal.
        true_sequential: Inside a block, let each layer see the error of the layers before it. Costs
            one more forward pass per stage.
        mse: Clip each group's range where that lowers the rounding error.
        clip: The same, with errors weighed by what they cost the layer's output; excludes ``mse``, and is the default
            without it.
        feedback: How much of the error of the layers before a layer makes up for, from 0 to 1: it is fitted to
            what the full-precision model computes from its own inputs. Costs a second stream of hidden states, and
            wants ``true_sequential``: else layers of a block each make up for the same error.
        refine: Rounds that choose scales, zero points and codes again under the Hessian; each costs about three times
            the solving. ``bench/results/h200/switches.json`` has what these switches are worth.
        lm_head: Quantize the output head too.
        embeddings: Quantize the input embedding too, to nearest.
        dynamic: Per-module rules, tried in order, as GPTQModel writes them: ``"-:regex"`` leaves the
            modules it matches alone; ``"regex"`` or ``"+:regex"`` overrides ``bits``, ``group_size``,
            ``sym``, ``desc_act``, ... The regex is matched from the start of the module's full name. A
            field that cannot be overridden is kept and, with a warning, ignored.
        checkpoint_format: "gptq" (v1) or "gptq_v2"; default: v1 if symmetric, else v2, because v1 has
            no agreed way to store a zero point of 0.
        extra: Fields of a file that this class does not know, kept verbatim.

    Raises:
        ValueError: A field is out of range, or a rule is not a valid regex or override.
        TypeError: A field is not of its type.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    static_groups: bool = False
    group_aware: bool = True
    damp_percent: float = 0.01
    true_sequential: bool = False
    mse: bool = False
    clip: bool = None  # pyright: ignore[reportAssignmentType] bool once it is made
    feedback: float = 0.0
    refine: int = 1
    lm_head: bool = False
    embeddings: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checkpoint_format: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec()
        if self.clip is None:
            object.__setattr__(self, "clip", not self.mse)
        for name in (
            "sym",
            "desc_act",
            "static_groups",
            "group_aware",
            "true_sequential",
            "mse",
            "clip",
            "lm_head",
            "embeddings",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.damp_percent, (int, float)) or isinstance(self.damp_percent, bool):
            raise TypeError(f"damp_percent must be a number, got {self.damp_percent!r}")
        if not 0 < self.damp_percent <= 1:
            raise ValueError(f"damp_percent must lie in (0, 1], got {self.damp_percent}")
        check_refinement(self.mse, self.clip, self.refine, self.feedback)
        self._check_dynamic()
        if not self.checkpoint_format:
            rules_sym = all(rule.get("sym", True) for rule in self.dynamic.values() if rule)
            object.__setattr__(self, "checkpoint_format", "gptq" if self.sym and rules_sym else "gptq_v2")
        zero_offset(self.checkpoint_format)

    @property
    def trivial(self) -> bool:
        """Whether the result has groups in order, so that readers need no g_idx."""
        return not self.desc_act or self.static_groups

    def spec(self) -> QuantSpec:
        """The format of one weight."""
        return QuantSpec(self.bits, self.group_size, self.sym, self.desc_act)

    def solver_options(self, scale_dtype: torch.dtype = torch.float16) -> SolverOptions:
        """The same choices as the solver takes them."""
        return SolverOptions(
            damp=self.damp_percent,
            static_groups=self.static_groups,
            group_aware=self.group_aware,
            mse=self.mse,
            clip=self.clip,
            feedback=self.feedback,
            refine=self.refine,
            scale_dtype=scale_dtype,
            checkpoint_format=self.checkpoint_format,
        )

    def for_module(self, name: str) -> QuantizeConfig | None:
        """The configuration of one module by its full name, or None if a rule leaves it alone."""
        for pattern, rule in self.dynamic.items():
            if re.match(pattern.removeprefix("-:").removeprefix("+:"), name):
                return None if pattern.startswith("-:") else self._override(rule)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields of both config files, unknown ones included."""
        out = dict(self.extra) | {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": not self.trivial,
            "static_groups": self.static_groups,
            "damp_percent": self.damp_percent,
            "true_sequential": self.true_sequential,
            "lm_head": self.lm_head,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
        }
        if self.embeddings:  # a word of this package's own
            out["embeddings"] = True
        if self.dynamic:
            out["dynamic"] = {pattern: dict(rule or {}) for pattern, rule in self.dynamic.items()}
        if "format" in out:  # GPTQModel writes it under both names
            out["format"] = self.checkpoint_format
        meta = dict(out.get("meta") or {})
        mse = meta["mse"] if "mse" in meta and bool(meta["mse"]) == self.mse else self.mse  # GPTQModel: the norm
        for name in ("clip", "feedback", "refine"):  # words of this package's own
            meta.pop(name, None)
            if value := getattr(self, name):
                meta[name] = value
        out["meta"] = {**meta, "group_aware": self.group_aware, "mse": mse}
        return out

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantizeConfig:
        """Read either config file.

        Raises:
            ValueError: A field is missing or out of range, or the checkpoint is of another kind.
            TypeError: A field is not of its type.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"the quantization config must be a JSON object, got {fields!r}")
        found = _canonical(fields)
        if "zero_point" in found and "sym" not in found:  # AWQ's word for "not symmetric"
            found["sym"] = not found.pop("zero_point")
        _refuse_other_kinds(found)
        if "bits" not in found:
            raise ValueError("the quantization config has no `bits`")
        meta = found.get("meta") or {}
        if not isinstance(meta, Mapping):
            raise TypeError(f"meta must be a JSON object, got {meta!r}")
        meta = _canonical(meta)
        own_words = ("clip", "feedback", "refine")
        for name in ("static_groups", "group_aware", "mse", *own_words, "true_sequential", "damp_percent"):
            if name not in found and meta.get(name) is not None:
                found[name] = meta[name]
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        own = {name: value for name, value in found.items() if name in known and value is not None}
        own = {"checkpoint_format": "gptq", **UNSAID} | own
        extra = {name: value for name, value in fields.items() if name not in known}
        return cls(**own, extra=extra)

    def _check_dynamic(self) -> None:
        if not isinstance(self.dynamic, Mapping):
            raise TypeError(f"dynamic must map regexes to overrides, got {self.dynamic!r}")
        for pattern, rule in self.dynamic.items():
            try:
                re.compile(pattern.removeprefix("-:").removeprefix("+:"))
            except re.error as error:
                raise ValueError(f"dynamic: {pattern!r} is not a valid regex: {error}") from None
            if pattern.startswith("-:") and not rule:
                continue
            if not isinstance(rule, Mapping):
                raise TypeError(f"dynamic: {pattern!r} must have an object of overrides, got {rule!r}")
            if pattern.startswith("-:"):
                continue
            try:
                self._override(rule)
            except (ValueError, TypeError) as error:
                raise type(error)(f"dynamic: {pattern!r}: {error}") from None
            ignored = [name for name in rule if SYNONYMS.get(name, name) not in _OVERRIDABLE]
            if ignored:
                logger.warning("dynamic: %r sets %s, which is ignored", pattern, ", ".join(ignored))

    def _override(self, rule: Mapping[str, Any]) -> QuantizeConfig:
        own = {name: value for name, value in _canonical(rule).items() if name in _OVERRIDABLE}
        if own.get("mse"):
            own.setdefault("clip", None)
        return dataclasses.replace(self, dynamic={}, **own)


UNSAID = {"clip": False, "refine": 0}  # of a file that does not say: checkpoints of others are made without

_OVERRIDABLE = {f.name for f in dataclasses.fields(QuantizeConfig)} - {
    "dynamic",
    "checkpoint_format",
    "extra",
    "lm_head",
    "embeddings",
}


def _canonical(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under the names that QuantizeConfig has for them."""
    found = dict(fields)
    for old, new in SYNONYMS.items():
        if old in found and new not in found:
            found[new] = found.pop(old)
    if isinstance(found.get("mse"), (int, float)):
        found["mse"] = bool(found["mse"])
    return found


def read_config(folder: Path) -> QuantizeConfig:
    """The quantization config of a folder, from ``config.json`` or ``quantize_config.json``.

    Raises:
        ValueError: Neither file has one, or it is not of a GPTQ checkpoint this package reads.
    """
    merged: dict[str, Any] = {}
    for fields in read_fields(folder).values():
        merged |= fields
    if not merged:
        raise ValueError(f"{folder} has no quantization_config in config.json and no quantize_config.json")
    return QuantizeConfig.from_dict(merged)


def read_fields(folder: Path) -> dict[str, dict[str, Any]]:
    """What each of a folder's config files says about quantization, the one that wins last.

    Raises:
        ValueError: There is no folder, or a file is not a JSON object.
    """
    mend(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found: dict[str, dict[str, Any]] = {}
    for name in ("quantize_config.json", "config.json"):
        if (folder / name).exists():
            try:
                content = json.loads((folder / name).read_text())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{folder / name} is not valid JSON: {error}") from None
            if not isinstance(content, dict):
                raise ValueError(f"{folder / name} must hold a JSON object, got {str(content)[:100]}")
            own = (content.get("quantization_config") or {}) if name == "config.json" else content
            if not isinstance(own, dict):
                raise ValueError(f"quantization_config in {folder / name} must be a JSON object, got {str(own)[:100]}")
            found[name] = own
    return found


def _refuse_other_kinds(found: Mapping[str, Any]) -> None:
    if found.get("is_marlin_format"):
        raise ValueError("is_marlin_format is set: the weights are in the Marlin kernel layout, not GPTQ's")
    for name in ("quant_method", "checkpoint_format", "format"):
        value = str(found.get(name) or "gptq").lower()
        kind = next((text for key, text in REFUSED_FORMATS.items() if value.startswith(key)), None)
        if kind is not None or not value.startswith("gptq"):
            raise ValueError(f"{name} is {value!r}{f' ({kind})' if kind else ''}, which is not a GPTQ checkpoint")
    version = str(found.get("version") or "").lower()  # AutoAWQ's word for its format
    kind = next((text for key, text in REFUSED_FORMATS.items() if version.startswith(key)), None)
    if kind is not None:
        raise ValueError(f"version is {found['version']!r} ({kind}), which is not a GPTQ checkpoint")
    if str(found.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise ValueError(f"pack_dtype must be int32, got {found['pack_dtype']!r}")
