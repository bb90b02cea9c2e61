"""What a checkpoint says about a layer, what its tensors show, and what is wrong: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .config import QuantizeConfig
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


def _writer_is_gptqmodel(config: QuantizeConfig) -> bool:
    """Whether ``meta.quantizer`` names GPTQModel."""
    meta = config.extra.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    writers = [writers] if isinstance(writers, str) else writers if isinstance(writers, list) else []
    return any(isinstance(writer, str) and writer.lower().startswith("gptqmodel") for writer in writers)
