"""From one dialect to another without loss, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .atomic import check_target, renamed, replacing, unreplaced
from .config import QuantizeConfig, read_config, read_fields
from .dialects import detect
from .files import INDEXES, SUFFIXES, Files, open_checkpoint, tensor_files
from .findings import LOSSLESS, LOST, Claim, Finding, Layout, config_findings, corrected, file_claim
from .parts import LayerParts, layer_parts
from .tensorfile import Entry, file_order, write_tensors
from .zeros import FORM_OF_LABEL, LABEL_OF_FORM, V1, convert_zeros, decode_zeros


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        out: Folder or file written.
        layers: Quantized layers in it.
        changed: Layers whose zero points are stored in another form than before.
        repaired: What was mended.
    """

    out: str
    layers: int
    changed: int
    repaired: list[Finding]


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    repair: bool = False,
    zero_points: str | None = None,
) -> Conversion:
    """Write a checkpoint with its zero points stored in another form; every other tensor stays bit for bit.

    Args:
        source: A folder, or a single .safetensors or .pt file.
        out: Folder to write; a .safetensors file where the source is a file. It appears whole, or not at all.
        to: "v1" or "v2".
        repair: Also mend what can be mended without loss: widths, group sizes and desc_act in the config
            follow the tensors, a g_idx that nobody set is dropped, both config files are written.
        zero_points: "v1", "v2" or "v1-words": how they are stored in the source, whatever the evidence says.

    Raises:
        ValueError: The source cannot be read; it needs repair and ``repair`` is not set; or information
            would be lost, or is lost already. The message names the layers.
        OSError: ``out`` cannot be written; it is as it was.
    """
    source, label = Path(source), {V1: "gptq", "v2": "gptq_v2"}.get(to)
    if label is None:
        raise ValueError(f"to must be one of {tuple(LABEL_OF_FORM)}, got {to!r}")
    single, config = source.is_file(), None
    target = _target(source, Path(out), single)
    with ExitStack() as stack:  # what is entered first is left last: the source is looked at again before out appears
        fresh = stack.enter_context(renamed(target) if single else replacing(target))
        if not single:
            stack.enter_context(unreplaced(source))
            config = read_config(source)
        files = stack.enter_context(open_checkpoint(source))
        layers = layer_parts(files)
        layouts = {name: _detect(part, config, zero_points) for name, part in layers.items()}
        mended = _judge(layers, layouts, to, repair, zero_points is not None)
        if config is None:
            _write_file(fresh, files, list(files), layouts, label)
        else:
            fixed = replace(corrected(config, layouts) if repair else config, checkpoint_format=label)
            _write_folder(source, fresh, files, layouts, fixed, repair)
            if repair:
                mended += config_findings(source, config, [layout.act_order for layout in layouts.values()])
    changed = sum(FORM_OF_LABEL[label] != layout.zeros for layout in layouts.values())
    return Conversion(str(out), len(layouts), changed, mended)


def _target(source: Path, out: Path, single: bool) -> Path:
    if not single:
        target = check_target(out)
        if source.resolve().is_relative_to(target):
            raise ValueError(f"{out} holds the source and would be replaced; name another folder")
        return target
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"{out} must be a .safetensors file, as {source} is a file")
    return out


def _detect(part: LayerParts, config: QuantizeConfig | None, zero_points: str | None) -> Layout:
    try:
        claim = Claim.of(config, part.name) if config else file_claim(part.metadata)
        return detect(part, claim, zero_points=zero_points)
    except ValueError as error:
        raise ValueError(f"{part.path}: {part.name}: {error}") from None


def _judge(
    layers: Mapping[str, LayerParts], layouts: Mapping[str, Layout], to: str, repair: bool, told: bool
) -> list[Finding]:
    """Refuse what would lose something; returns what is mended."""
    found = [finding for layout in layouts.values() for finding in layout.findings]
    if lost := [finding for finding in found if finding.repair == LOST]:
        raise ValueError(f"information is lost already: {_named(lost)}")
    doubtful = [finding for finding in found if finding.kind == "zeros" and "v1-words" in finding.text]
    if doubtful and not told:
        raise ValueError(f"zero points may be read in two ways: {_named(doubtful)}")
    mended = [finding for finding in found if finding.repair == LOSSLESS]
    if (broken := [finding for finding in mended if finding.kind != "label"]) and not repair:
        raise ValueError(f"needs repair, which was not asked for: {_named(broken)}")
    if to == V1:
        zero = [name for name, part in layers.items() if _holds_zero(part, layouts[name])]
        if zero:
            raise ValueError(
                f"v1 has no agreed way to store a zero point of 0, which {len(zero)} layers have: "
                f"{', '.join(zero[:10])}{', ...' if zero[10:] else ''}; keep v2"
            )
    return mended


def _holds_zero(part: LayerParts, layout: Layout) -> bool:
    zeros = decode_zeros(part.read("qzeros"), layout.bits, layout.N, layout.zeros)
    return bool((zeros == 0).any())


def _named(findings: list[Finding]) -> str:
    names = ", ".join(finding.layer for finding in findings[:10])
    return f"{len(findings)} layers ({names}{', ...' if findings[10:] else ''}): {findings[0].text}"


def _converted(files: Files, key: str, layouts: Mapping[str, Layout], label: str) -> Tensor:
    tensor = files[key].read(key)
    name, _, part = key.rpartition(".")
    if part == "qzeros" and name in layouts:
        layout = layouts[name]
        return convert_zeros(tensor, layout.bits, layout.N, layout.zeros, FORM_OF_LABEL[label])
    return tensor


def _kept(key: str, layouts: Mapping[str, Layout]) -> bool:
    """Whether a tensor is written: all but a g_idx that nobody set."""
    name, _, part = key.rpartition(".")
    return part != "g_idx" or name not in layouts or all(f.kind != "g_idx" for f in layouts[name].findings)


def _write_file(path: Path, files: Files, keys: list[str], layouts: Mapping[str, Layout], label: str) -> None:
    """One safetensors file of these tensors, one of them in memory at a time."""
    entries = {key: files[key].entries[key] for key in keys if _kept(key, layouts)}
    ordered: dict[str, Entry] = {key: entries[key] for key in file_order(entries)}
    metadata = {**files[keys[0]].metadata, "format": "pt", "checkpoint_format": label}
    write_tensors(path, ordered, ((key, _converted(files, key, layouts, label)) for key in ordered), metadata)


def _write_folder(
    source: Path, fresh: Path, files: Files, layouts: Mapping[str, Layout], config: QuantizeConfig, repair: bool
) -> None:
    names = {path: path.name for path in tensor_files(source)}
    if any(path.suffix != ".safetensors" for path in names):
        count = len(names)
        names = {
            path: "model.safetensors" if count == 1 else f"model-{index:05d}-of-{count:05d}.safetensors"
            for index, path in enumerate(names, 1)
        }
    for path, name in names.items():
        keys = [key for key, file in files.items() if file.path == path]
        if keys:
            _write_file(fresh / name, files, keys, layouts, config.checkpoint_format)
    if len(names) > 1 or any((source / index).exists() for index in INDEXES):
        written = {key: names[file.path] for key, file in files.items() if _kept(key, layouts)}
        total = sum(files[key].entries[key].size for key in written)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
        (fresh / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n")
    for path in source.iterdir():
        if path.is_file() and path.suffix not in SUFFIXES and path.name not in INDEXES:
            shutil.copy2(path, fresh / path.name)
    _write_configs(source, fresh, layouts, config, repair)


def _write_configs(
    source: Path, fresh: Path, layouts: Mapping[str, Layout], config: QuantizeConfig, repair: bool
) -> None:
    """Both config files: as they were with the new label, or, where repair is asked for, all that the tensors show."""
    label = config.checkpoint_format
    mended = config.to_dict() | {"desc_act": any(layout.act_order for layout in layouts.values())}
    for name, fields in read_fields(source).items():
        own = (
            mended
            if repair
            else fields | {"checkpoint_format": label} | ({"format": label} if "format" in fields else {})
        )
        content = json.loads((source / name).read_text())
        if name == "config.json" and (fields or repair):
            content["quantization_config"] = own
        elif name != "config.json":
            content = own
        (fresh / name).write_text(json.dumps(content, indent=2) + "\n")
    if repair and not (fresh / "quantize_config.json").exists():
        (fresh / "quantize_config.json").write_text(json.dumps(mended, indent=2) + "\n")
