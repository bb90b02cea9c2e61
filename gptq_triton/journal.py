"""What makes a killed run resumable: finished blocks on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .atomic import atomic_write
from .config import QuantizeConfig
from .files import read_tensors, save_tensors
from .linear import QuantLinear
from .streaming import Batch


class Journal:
    """Finished blocks on disk, one atomic file each, tied to one exact run."""

    def __init__(
        self, folder: str | Path | None, model: nn.Module, batches: list[Batch], config: QuantizeConfig, method: str
    ):
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        label = json.dumps({"run": _fingerprint(model, batches, config, method)})
        path = self.folder / "run.json"
        if not path.exists():
            atomic_write(path, label)
        elif path.read_text() != label:
            raise ValueError(
                f"workdir {self.folder} holds blocks of another run (other weights, calibration or config); "
                "remove it or name another"
            )

    def save(self, index: int, packed: Mapping[str, QuantLinear], reports: Iterable[Any]) -> None:
        """Keep one solved block; reports are dataclasses of plain values."""
        if self.folder is None:
            return
        tensors = {
            f"{name}.{key}": value for name, layer in packed.items() for key, value in layer.state_dict().items()
        }
        layers = {
            name: [*asdict(layer.spec).values(), layer.infeatures, layer.outfeatures, layer.checkpoint_format]
            for name, layer in packed.items()
        }
        about = {"layers": json.dumps(layers), "reports": json.dumps([asdict(report) for report in reports])}
        save_tensors(self.folder / f"block-{index:05d}.safetensors", tensors, about)

    def load(self, index: int) -> tuple[dict[str, QuantLinear], list[dict[str, Any]]] | None:
        """A block kept earlier: its layers, and its reports as dicts; or None."""
        if self.folder is None or not (path := self.folder / f"block-{index:05d}.safetensors").exists():
            return None
        tensors, about = read_tensors(path)
        packed = {}
        for name, (bits, group_size, _, _, K, N, checkpoint_format) in json.loads(about["layers"]).items():
            layer = QuantLinear(bits, group_size, K, N, device="meta", checkpoint_format=checkpoint_format)
            own = {k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name + ".")}
            layer.load_state_dict(own, assign=True)
            layer.checkpoint_format = checkpoint_format  # known here, whatever the zero points look like
            packed[name] = layer
        return packed, json.loads(about["reports"])


def _fingerprint(model: nn.Module, batches: list[Batch], config: QuantizeConfig, method: str) -> str:
    """Differs when the result would: weights (sampled), calibration, configuration."""
    digest = hashlib.sha256(json.dumps([config.to_dict(), method], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
    for batch in batches:
        for name, tensor in batch.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
