"""What a checkpoint says about a layer, what its tensors show, and what is wrong: plain values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .config import QuantizeConfig, read_fields
from .packing import zero_offset
from .spec import QuantSpec

LOSSLESS, LOST = "lossless", "lost"


@dataclass(frozen=True)
class Finding:
    """Something about a checkpoint that its owner should know.

    Attributes:
        layer: Full module name; "" for the whole checkpoint.
        kind: "error" (unreadable), "config", "label", "g_idx", "scales", "zeros" or "codes".
        text: One sentence.
        repair: "lossless" where ``convert --repair`` mends it, "lost" where information is gone, else "".
    """

    layer: str
    kind: str
    text: str
    repair: str = ""

    def __str__(self) -> str:
        return f"{self.layer}: {self.text}" if self.layer else self.text

    @property
    def gist(self) -> str:
        """The text without its figures: findings of one gist can share a line."""
        return re.sub(r"[-+]?\d[\d.]*", "#", self.text)


@dataclass(frozen=True)
class Layout:
    """How one layer is stored.

    Attributes:
        bits: Width.
        group_size: Rows per group; -1 for one group.
        K: In-features.
        N: Out-features.
        sym: Whether the config calls it symmetric.
        act_order: Whether g_idx says more than "groups in order".
        zeros: Form of the zero points: "v1", "v2" or "v1-words" (:mod:`gptq_triton.zeros`).
        evidence: What decided that: "tensors" (symmetric zero points prove it), "writer", "label" or "user".
        findings: What was found on the way.
    """

    bits: int
    group_size: int
    K: int
    N: int
    sym: bool
    act_order: bool
    zeros: str
    evidence: str
    findings: tuple[Finding, ...] = ()

    @property
    def spec(self) -> QuantSpec:
        """The mathematics."""
        return QuantSpec(self.bits, self.group_size, self.sym, self.act_order)


@dataclass(frozen=True)
class Claim:
    """What is said about one layer, by a config or a caller; None where nothing is.

    Attributes:
        bits: Width.
        group_size: Rows per group.
        sym: Whether every zero point is in the middle.
        label: "gptq" or "gptq_v2".
        gptqmodel: Whether GPTQModel wrote it, which stores v1 zero points by whole words.
    """

    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None
    label: str = "gptq"
    gptqmodel: bool = False

    @classmethod
    def of(cls, config: QuantizeConfig, *names: str) -> Claim:
        """What a config says about a layer, which may have several names; the first rule that fits counts."""
        rules = (config.for_module(name) for name in names)
        own = next((rule for rule in rules if rule not in (None, config)), config)
        return cls(own.bits, own.group_size, own.sym, config.checkpoint_format, _writer_is_gptqmodel(config))


def file_claim(metadata: Mapping[str, str]) -> Claim:
    """What the metadata of a single file says: the label, if :func:`gptq_triton.convert_checkpoint` wrote it.

    Raises:
        ValueError: The label is unknown.
    """
    label = metadata.get("checkpoint_format", "gptq")
    zero_offset(label)
    return Claim(label=label)


def config_findings(folder: Path, config: QuantizeConfig, act_order: list[bool]) -> list[Finding]:
    """What the config files of a folder get wrong, or do not say.

    Args:
        folder: Of the checkpoint.
        config: As read from it.
        act_order: Of each layer.
    """
    found, said = [], read_fields(folder)
    both = [fields for fields in said.values() if fields]
    if len(both) == 2:
        differ = [name for name in _COMPARED if name in both[0] and name in both[1] and both[0][name] != both[1][name]]
        if differ:
            text = f"quantize_config.json and config.json disagree about {', '.join(differ)}; the latter counts"
            found.append(Finding("", "config", text, LOSSLESS))
    else:
        missing = next(name for name in ("quantize_config.json", "config.json") if not said.get(name))
        found.append(Finding("", "config", f"{missing} says nothing about quantization", LOSSLESS))
    if not any({"checkpoint_format", "format"} & fields.keys() for fields in both):
        text = "no checkpoint_format is given: readers have to guess how zero points are stored"
        found.append(Finding("", "label", text, LOSSLESS))
    if config.desc_act and act_order and not any(act_order):
        text = "desc_act is true, but all groups are in order: readers without act-order refuse it for nothing"
        found.append(Finding("", "g_idx", text, LOSSLESS))
    ruled = any(rule.get("desc_act") for rule in config.dynamic.values() if rule)
    if any(act_order) and not config.desc_act and not ruled:
        text = f"desc_act is false, but g_idx of {sum(act_order)} layers is not in order: who believes it misreads them"
        found.append(Finding("", "g_idx", text, LOSSLESS))
    return found


def corrected(config: QuantizeConfig, layouts: Mapping[str, Layout]) -> QuantizeConfig:
    """The config with the widths and group sizes that the tensors hold."""
    wrong = {
        name: layout for name, layout in layouts.items() if any(finding.kind == "config" for finding in layout.findings)
    }
    if not wrong:
        return config
    kinds = {(layout.bits, layout.group_size) for layout in layouts.values()}
    if len(kinds) == 1:
        bits, group_size = kinds.pop()
        rules = {pattern: rule for pattern, rule in config.dynamic.items() if pattern.startswith("-:")}
        return dataclasses.replace(config, bits=bits, group_size=group_size, dynamic=rules)
    rules = {
        f"+:{re.escape(name)}$": {"bits": layout.bits, "group_size": layout.group_size}
        for name, layout in wrong.items()
    }
    return dataclasses.replace(config, dynamic={**rules, **config.dynamic})


def _writer_is_gptqmodel(config: QuantizeConfig) -> bool:
    """Whether ``meta.quantizer`` names GPTQModel."""
    meta = config.extra.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    writers = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    return any(isinstance(writer, str) and writer.lower().startswith("gptqmodel") for writer in writers)


_COMPARED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic", "lm_head")
