"""Bit-exact references made by the original ColossalAI / GPTQ-for-LLaMa code."""

import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent
CASES = json.loads((FOLDER / "index.json").read_text())
SHAPES = dict(np.load(FOLDER / "quantizer_shapes.npz"))


def load(case):
    """The tensors of one case and what its name says: bits, group_size, sym, mse."""
    data = {name: torch.from_numpy(value) for name, value in np.load(FOLDER / f"{case}.npz").items()}
    bits, group, *flags = case.split("_")
    return data | {"bits": int(bits[1:]), "group_size": int(group[1:]), "sym": "sym" in flags, "mse": "mse" in flags}
