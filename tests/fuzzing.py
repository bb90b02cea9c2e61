"""Damaged checkpoints by number, and what loading one of them may do: fail with a clear error, or give the values
that the bytes mean. The oracle shares no code with the readers: the safetensors library and numpy's bits."""

from __future__ import annotations

import json
import logging
import random
import shutil
import signal
import struct
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from gptq_triton import (
    QuantizeConfig,
    QuantLinear,
    convert_checkpoint,
    inspect_checkpoint,
    load_quant,
    load_quantized,
    quantize_model,
    save_quantized,
)
from gptq_triton.config import read_config
from gptq_triton.zeros import WORD_OFFSETS
from tests.tiny import batches, tiny

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"head_dim": 32, "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 16}
CONFIGS = {
    "sym": QuantizeConfig(4, 16),
    "asym": QuantizeConfig(3, 32, sym=False, desc_act=True),
    "old": QuantizeConfig(8, -1, sym=False, checkpoint_format="gptq"),
    "words": QuantizeConfig(4, 16, sym=False),
    "mixed": QuantizeConfig(4, 16, dynamic={".*up_proj": {"bits": 8, "group_size": 32}, "-:.*o_proj": {}}),
    "shards": QuantizeConfig(2, 16, sym=False),
}
ALLOWED = (ValueError, TypeError, OSError)
WEIRD = [
    None,
    -1,
    0,
    1,
    3,
    1e308,
    float("nan"),
    "x",
    "gptq_v2",
    "",
    [],
    {},
    [1],
    {"a": 1},
    True,
    False,
    2**40,
    -(2**70),
]
SECONDS = 20  # no case may take longer


class Hang(BaseException):
    """A case took too long. Not an Exception, so that nothing swallows it."""


def make_bases(home: Path) -> None:
    """Every kind of checkpoint that is damaged later, one folder each, and one .pt file."""
    for name, config in CONFIGS.items():
        model = tiny("llama", **SMALL)
        quantize_model(model, [batches(1)[0] % 32], config, method="rtn", progress=False)
        save_quantized(model, home / name, max_shard_size="4KB" if name == "shards" else "5GB")
    tensors = load_file(home / "words" / "model.safetensors")
    for key in [key for key in tensors if key.endswith("qzeros")]:
        tensors[key][0] &= 0x0FF0FFF0  # some zero points of 0, which borrow from their neighbours
        tensors[key] -= WORD_OFFSETS[4][0]
    save_file(tensors, home / "words" / "model.safetensors", metadata={"format": "pt"})
    for path in (home / "words" / "config.json", home / "words" / "quantize_config.json"):
        content = json.loads(path.read_text())
        content.get("quantization_config", content).update(
            checkpoint_format="gptq", meta={"quantizer": ["gptqmodel:5"]}
        )
        path.write_text(json.dumps(content))
    torch.save(load_file(home / "sym" / "model.safetensors"), home / "old.pt")


def run_case(home: Path, seed: int, scratch: Path) -> str:
    """Damage a copy of one base in the way that ``seed`` says, and read it.

    Returns:
        "loaded" or "refused".

    Raises:
        AssertionError: Values differ from what the bytes mean, or readers disagree.
        Exception: Whatever else a reader raised: a crash.
    """
    rng = random.Random(seed)
    shutil.rmtree(scratch, ignore_errors=True)
    with _quiet(), _deadline():
        if rng.random() < 0.1:
            return _pt_case(home, rng, scratch)
        folder = shutil.copytree(home / rng.choice(list(CONFIGS)), scratch)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(MUTATIONS)(folder, rng)
        try:
            model = load_quantized(folder, device="cpu")
        except ALLOWED as error:
            _check_error(error)
            _only_clear_errors(inspect_checkpoint, folder)
            return "refused"
        expected = meaning(folder)
        check(model, expected)
        found = inspect_checkpoint(folder)
        assert not [f for f in found.findings if f.kind == "error"], found.findings
        assert {layer.name for layer in found.layers} == expected.keys()
        target = folder.with_name("converted")
        shutil.rmtree(target, ignore_errors=True)
        if rng.random() < 0.3 and _only_clear_errors(convert_checkpoint, folder, target, "v2", repair=True):
            check(load_quantized(target, device="cpu"), expected)
        return "loaded"


def meaning(folder: Path) -> dict[str, np.ndarray]:
    """Layer to the (N, K) float64 weights that a folder's bytes stand for, by FORMATS's rules and nobody's code."""
    config = read_config(folder)
    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    meta = config.extra.get("meta") or {}
    writers = meta.get("quantizer") if isinstance(meta.get("quantizer"), list) else [meta.get("quantizer")]
    by_gptqmodel = any(str(writer).lower().startswith("gptqmodel") for writer in writers)
    found = {}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        qweight, qzeros, scales = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales"))
        (rows, N), (G, columns) = qweight.shape, qzeros.shape
        bits = columns * 32 // N
        K = rows * 32 // bits
        rule = config.for_module(name) or config
        zeros = _zeros(qzeros.numpy().view(np.uint32), bits, rule.sym, config.checkpoint_format, by_gptqmodel)
        g_idx = tensors[f"{name}.g_idx"].numpy() if f"{name}.g_idx" in tensors else None
        if g_idx is None or (G > 1 and not g_idx.any()):
            g_idx = np.arange(K) // -(-K // G)
        codes = _fields(qweight.numpy().T, bits)  # (N, K)
        found[name] = scales.double().numpy()[g_idx].T * (codes - zeros[g_idx].T.astype(np.int64))
    return found


def _zeros(stored: np.ndarray, bits: int, sym: bool, label: str, by_gptqmodel: bool) -> np.ndarray:
    middle = 2 ** (bits - 1)
    offsets = np.resize(np.array(WORD_OFFSETS[bits], np.uint32), stored.shape[1])
    v2, words = _fields(stored, bits), _fields(stored + offsets, bits)
    v1 = (v2 + 1) % 2**bits
    if sym:
        for candidate in (v1, v2, words):
            if (candidate == middle).all():
                return candidate
    if label == "gptq_v2":
        return v2
    return words if by_gptqmodel and bits != 3 else v1


def _fields(words: np.ndarray, bits: int) -> np.ndarray:
    """(R, words) to (R, fields): the bits of each row as one stream, least significant first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream.reshape(len(words), -1, bits).astype(np.int64) @ (1 << np.arange(bits))


def check(model: nn.Module, expected: dict[str, np.ndarray]) -> None:
    """Fail unless the model's quantized layers hold these weights, to the last bit."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert np.array_equal(layer.dequantize(torch.float64).numpy(), expected[name]), f"{name} differs"


def _check_error(error: Exception) -> None:
    """It says more than that something went wrong."""
    assert len(str(error)) > 10, f"not a clear error: {error!r}"


def _only_clear_errors(read: Any, *arguments: Any, **options: Any) -> bool:
    try:
        read(*arguments, **options)
    except ALLOWED as error:
        _check_error(error)
        return False
    return True


def _pt_case(home: Path, rng: random.Random, scratch: Path) -> str:
    """A .pt file, whose checksums catch every change of its tensors."""
    scratch.mkdir()
    path = scratch / "old.pt"
    shutil.copy(home / "old.pt", path)
    _bytes_of(path, rng)
    model = tiny("llama", **SMALL)
    try:
        load_quant(model, path)
    except ALLOWED as error:
        _check_error(error)
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            raise AssertionError("a refused file was half loaded") from error
        return "refused"
    check(model, meaning(home / "sym"))
    return "loaded"


# the ways to damage a folder


def _weights(folder: Path, rng: random.Random) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    return rng.choice(found) if found else folder / "model.safetensors"


def _bytes_of(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    start = rng.randrange(max(1, len(raw)))
    length = min(rng.choice((1, 2, 8, 100)), len(raw) - start)
    kind = rng.randrange(5)
    if kind == 0:
        raw = raw[:start]
    elif kind == 1:
        raw[start:start] = rng.randbytes(length)
    elif kind == 2:
        del raw[start : start + length]
    else:
        for index in range(start, start + length):
            raw[index] = rng.randrange(256) if kind == 3 else 0
    path.write_bytes(raw)


def _any_bytes(folder: Path, rng: random.Random) -> None:
    _bytes_of(rng.choice(sorted(path for path in folder.iterdir() if path.is_file())), rng)


def _header_bytes(folder: Path, rng: random.Random) -> None:
    path = _weights(folder, rng)
    raw = bytearray(path.read_bytes() if path.exists() else b"")
    end = 8 + struct.unpack("<Q", raw[:8])[0] if len(raw) >= 8 else len(raw)
    for _ in range(rng.choice((1, 1, 4))):
        if raw:
            raw[rng.randrange(min(len(raw), max(end, 1)))] = rng.choice((rng.randrange(256), *b'0123456789",:{}[]'))
    path.write_bytes(raw)


def _header_fields(folder: Path, rng: random.Random) -> None:
    path = _weights(folder, rng)
    raw = path.read_bytes() if path.exists() else b""
    try:
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        name = rng.choice([key for key in header if key != "__metadata__"])
        about = header[name]
        field = rng.choice(("dtype", "shape", "data_offsets", "name", "drop", "extra", "metadata"))
        if field == "dtype":
            about["dtype"] = rng.choice(("F32", "F16", "BF16", "I32", "I64", "U8", "F64", "Q4", None))
        elif field in ("shape", "data_offsets"):
            values = about[field]
            values[rng.randrange(len(values))] = rng.choice(
                (0, 1, -1, 2**63, 2**31, 1.5, None, values[-1] + 1, values[0])
            )
        elif field == "name":
            header[rng.choice((*header, name + "x", name.replace("q", "k")))] = header.pop(name)
        elif field == "drop":
            del header[name]
        else:
            header["__metadata__" if field == "metadata" else "extra"] = rng.choice(WEIRD)
        fresh = json.dumps(header).encode()
    except (ValueError, struct.error, IndexError, KeyError, TypeError, AttributeError):
        return  # damaged already
    path.write_bytes(struct.pack("<Q", len(fresh)) + fresh + raw[8 + length :])


def _tensors(folder: Path, rng: random.Random) -> None:
    """A well-formed file with one odd tensor."""
    path = _weights(folder, rng)
    try:
        tensors = load_file(path)
    except Exception:  # damaged already
        return
    if not tensors:
        return
    key = rng.choice(sorted(tensors))
    old = tensors[key]
    flat = old.clone().flatten()
    kind = rng.randrange(8)
    if kind == 0 and len(flat):
        flat[rng.randrange(len(flat))] = rng.choice((-1, 0, 1, 2, 100))
        tensors[key] = flat.view(old.shape)
    elif kind == 1:
        tensors[key] = old.to(rng.choice((torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.float64)))
    elif kind == 2:
        tensors[key] = old[: max(len(old) - 1, 0)].clone() if old.dim() else old
    elif kind == 3:
        tensors[key] = old.t().contiguous() if old.dim() == 2 else old[None].clone()
    elif kind == 4:
        del tensors[key]
    elif kind == 5:
        tensors[rng.choice((key + "x", "model.extra.weight", key.replace("0", "7")))] = old.clone()
    elif kind == 6 and old.is_floating_point() and len(flat):
        flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), 0.0, -1.0))
        tensors[key] = flat.view(old.shape)
    else:
        tensors[key] = torch.zeros_like(old)
    save_file(tensors, path, metadata={"format": "pt"})


def _config(folder: Path, rng: random.Random) -> None:
    """One field of one config file, at any depth, set to something odd, removed or added."""
    path = rng.choice(sorted(folder.glob("*.json")))
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return  # damaged already
    place = content
    while isinstance(place, dict) and place and rng.random() < 0.6:
        inner = [value for value in place.values() if isinstance(value, dict) and value]
        if not inner:
            break
        place = rng.choice(inner)
    if not isinstance(place, dict) or not place:
        return
    key = rng.choice(sorted(place, key=str))
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key if rng.random() < 0.9 else "added"] = rng.choice((*WEIRD, *place.values()))
    path.write_text(json.dumps(content))


def _label(folder: Path, rng: random.Random) -> None:
    """One field of the quantization config, in both files, set to a value that is right for another checkpoint."""
    field, values = rng.choice(
        [
            ("bits", (2, 3, 4, 8)),
            ("group_size", (-1, 8, 16, 32, 64, 128)),
            ("sym", (True, False)),
            ("desc_act", (True, False)),
            ("checkpoint_format", ("gptq", "gptq_v2", "marlin", None)),
            ("meta", ({"quantizer": ["gptqmodel:5"]}, {"quantizer": "gptqmodel"}, {"quantizer": 3}, None)),
            ("dynamic", ({".*": {"bits": 3}}, {"-:.*": {}}, {".*up": {"sym": False}}, None)),
        ]
    )
    value = rng.choice(values)
    for name in ("config.json", "quantize_config.json"):
        try:
            content = json.loads((folder / name).read_text())
            content.get("quantization_config", content)[field] = value
        except (ValueError, AttributeError, TypeError, FileNotFoundError):
            continue  # damaged already
        (folder / name).write_text(json.dumps(content))


def _index(folder: Path, rng: random.Random) -> None:
    path = folder / "model.safetensors.index.json"
    names = [
        "../x.safetensors",
        "/etc/passwd",
        "model.safetensors",
        "",
        "nothing.safetensors",
        5,
        None,
        "a\0.safetensors",
    ]
    content: Any = {"weight_map": {"model.norm.weight": rng.choice(names)}}
    path.write_text(json.dumps(rng.choice((content, content, [], {}, {"weight_map": 5}, "x"))))


def _missing(folder: Path, rng: random.Random) -> None:
    rng.choice(sorted(path for path in folder.iterdir() if path.is_file())).unlink()


MUTATIONS = (
    *(_any_bytes, _any_bytes, _header_bytes, _header_bytes, _header_fields, _header_fields),
    *(_tensors, _tensors, _config, _config, _label, _index, _missing),
)


@contextmanager
def _quiet():
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _deadline():
    def stop(*_: Any) -> None:
        raise Hang(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
