"""transformers' tensor parallel: each rank reads its parts of quantized layers straight from the checkpoint.

transformers' parallel styles move activations; the layers themselves are cut here, because words hold several
codes and groups several rows, which no slicing of tensors respects.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from gptq_triton.embedding import QuantEmbedding
from gptq_triton.experts import Experts
from gptq_triton.findings import Layout
from gptq_triton.linear import QuantLinear
from gptq_triton.parts import LayerParts
from gptq_triton.zeros import LABEL_OF_FORM, V2, convert_zeros

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


def tp_mesh(model: Any) -> DeviceMesh | None:
    """The ranks over which transformers has split a model's layers, if it has."""
    if getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) < 2:
        return None
    if hasattr(model, "_mesh_manager"):
        return model._mesh_manager.get_mesh("tp")
    mesh = model._device_mesh  # before transformers 5.23
    return mesh["tp"] if mesh.ndim > 1 else mesh


def read_shard(
    model: Any, mesh: DeviceMesh, name: str, layer: QuantLinear, layout: Layout, part: LayerParts
) -> QuantLinear:
    """This rank's part of one layer; of its codes, no more rows are read than it has.

    Args:
        model: Distributed by transformers.
        mesh: The ranks that share the layer.
        name: Of the module.
        layer: What stands there.
        layout: How the checkpoint holds the layer.
        part: The layer's tensors.

    Raises:
        ValueError: The layer cannot be cut as the plan wants it.
    """
    style = model.tp_plan.get(_wildcard(name), "replicate")
    if style not in _KINDS:
        raise ValueError(f"{name}: parallel style {style!r} is not for quantized layers")
    form = layout.zeros if layout.zeros in LABEL_OF_FORM else V2
    tensors: dict[str, Any] = {
        "qweight": _Rows(part),
        "qzeros": convert_zeros(part.read("qzeros"), layout.bits, layout.N, layout.zeros, form),
        "scales": part.read("scales"),
    }
    tensors |= {"g_idx": part.read("g_idx").to(torch.int32)} if layout.act_order else {}
    tensors |= {"bias": part.read("bias")} if "bias" in part.entries else {}
    whole = QuantLinear(
        layout.bits, layout.group_size, layout.K, layout.N, device="meta", checkpoint_format=LABEL_OF_FORM[form]
    )
    try:
        shard(whole, _KINDS[style], mesh.get_local_rank(), mesh.size(), tensors, next(model.parameters()).device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return whole


def adapt_plan(model: Any, plan: dict[str, str]) -> None:
    """Rewrite a parallel plan for modules that are not what the architecture has.

    Experts that were taken apart are each cut as an MLP is, or none in an expert-parallel plan; a quantized
    embedding stays whole.
    """
    for name, module in model.named_modules():
        path = _wildcard(name)
        if isinstance(module, QuantEmbedding):
            plan.pop(path, None)
        elif isinstance(module, Experts):
            ruled = [key for key in plan if key == path or key.startswith(path + ".")]
            for key in ruled:
                del plan[key]
            if ruled and plan is model.tp_plan:
                plan.update({f"{path}.*.{inner}": "colwise" for inner in module.inner})
                plan[f"{path}.*.{module.outer}"] = "rowwise"


def _wildcard(name: str) -> str:
    """The name that a plan has for a module."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


class _Rows:
    """The codes of a layer in a file, read as they are asked for."""

    def __init__(self, part: LayerParts):
        self.part = part

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        rows, columns = index
        return self.part.rows("qweight", rows.start, rows.stop)[:, columns]
