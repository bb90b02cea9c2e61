"""transformers' tensor parallel: each rank reads its parts of quantized layers straight from the checkpoint.

transformers' parallel styles move activations; the layers themselves are cut here, because words hold several
codes and groups several rows, which no slicing of tensors respects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from gptq_triton.embedding import QuantEmbedding
from gptq_triton.experts import Experts
from gptq_triton.files import open_files
from gptq_triton.inspection import PARTS
from gptq_triton.linear import QuantLinear
from gptq_triton.packing import PackedWeight, symmetric_format

from .tensor_parallel import shard

# what transformers' styles mean for the weight they run over
_KINDS = {
    "colwise": "colwise",
    "colwise_rep": "colwise",
    "colwise_gather_output": "colwise",
    "packed_colwise": "packed_colwise",
    "rowwise": "rowwise",
    "rowwise_rep": "rowwise",
    "rowwise_split_input": "rowwise",
    "replicate": "replicate",
    "replicated_with_grad_allreduce": "replicate",
    "mla_kv_a_proj": "replicate",
}


def leave_out(model: Any, layers: Mapping[str, str]) -> None:
    """Keep transformers from loading these layers.

    Args:
        model: Being built.
        layers: Module name to name in the checkpoint.
    """
    for name in layers:
        layer: Any = model.get_submodule(name)
        layer._hf_quantized_needs_local_tp = True  # transformers' styles then give and take plain tensors
        layer._buffers.update(dict.fromkeys(PARTS))
    names = "|".join(map(re.escape, {*layers, *layers.values()}))
    ignored = rf"^(?:{names})\.(?:{'|'.join(PARTS)})$"
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), ignored}


def load_shards(model: Any, layers: Mapping[str, str], symmetric: set[str], files: Sequence[str]) -> None:
    """Fill the layers that were left out with this rank's part.

    Args:
        model: Distributed by transformers.
        layers: Module name to name in the checkpoint.
        symmetric: Names of modules whose zero points tell how they are stored.
        files: Of the checkpoint.

    Raises:
        ValueError: The files are no safetensors, or a layer cannot be cut as the plan wants it.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    if not all(str(file).endswith(".safetensors") for file in files):
        raise ValueError(f"tensor parallel loading reads parts of safetensors files, got {Path(files[0]).name}")
    mesh = model._mesh_manager.get_mesh("tp")
    device = next(model.parameters()).device
    with open_files(_where(files)) as opened:
        for name, source in layers.items():
            style = model.tp_plan.get(replace_layer_number_by_wildcard(name), "replicate")
            if style not in _KINDS:
                raise ValueError(f"{name}: parallel style {style!r} is not for quantized layers")
            keys = {part: f"{source}.{part}" for part in PARTS if f"{source}.{part}" in opened}
            parts = {part: opened[key].get_slice(key) for part, key in keys.items()}
            layer = cast("QuantLinear", model.get_submodule(name))
            if name in symmetric:
                empty = torch.empty(0, layer.outfeatures, dtype=torch.int32)
                zeros = PackedWeight(empty, empty, parts["qzeros"][:], None, layer.spec, layer.infeatures)
                layer.checkpoint_format = symmetric_format(zeros) or layer.checkpoint_format
            try:
                shard(layer, _KINDS[style], mesh.get_local_rank(), mesh.size(), parts, device)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def adapt_plan(model: Any, plan: dict[str, str]) -> None:
    """Rewrite a parallel plan for modules that are not what the architecture has.

    Experts that were taken apart are each cut as an MLP is, or none in an expert-parallel plan; a quantized
    embedding stays whole.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    for name, module in model.named_modules():
        path = replace_layer_number_by_wildcard(name)
        if isinstance(module, QuantEmbedding):
            plan.pop(path, None)
        elif isinstance(module, Experts):
            ruled = [key for key in plan if key == path or key.startswith(path + ".")]
            for key in ruled:
                del plan[key]
            if ruled and plan is model.tp_plan:
                plan.update({f"{path}.*.{inner}": "colwise" for inner in module.inner})
                plan[f"{path}.*.{module.outer}"] = "rowwise"


def _where(files: Sequence[str]) -> dict[str, Path]:
    """Tensor name to file."""
    from safetensors import safe_open

    where = {}
    for path in files:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), Path(path))
    return where
