"""Tensor parallel: quantized layers as parallel styles for PyTorch's ``parallelize_module``.

A column-wise layer keeps a run of outputs, a row-wise one a run of inputs, split as DTensor splits. transformers'
``tp_plan`` needs none of this: its own styles run over layers that :func:`shard` has cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from gptq_triton.fusing import Split
from gptq_triton.linear import QuantLinear

from .sharding import chunk, cut

__all__ = ["ColwiseQuantLinear", "RowwiseQuantLinear", "is_shard", "shard", "take_over"]

_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_BUFFERS = ("_buffers", "_non_persistent_buffers_set")


class ColwiseQuantLinear(ParallelStyle):
    """Outputs split over the ranks; as PyTorch's ColwiseParallel, for QuantLinear.

    Args:
        input_layouts: How x is spread; default: every rank has all of it.
        output_layouts: How y is to be spread; default: along its last dimension.
        use_local_output: Return this rank's tensor instead of a DTensor.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts or Replicate(), output_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _install(module, device_mesh, "colwise", Replicate(), Shard(-1), self)


class RowwiseQuantLinear(ParallelStyle):
    """Inputs split over the ranks and outputs summed; as PyTorch's RowwiseParallel, for QuantLinear.

    Args:
        input_layouts: How x is spread; default: along its last dimension.
        output_layouts: How y is to be spread; default: every rank gets all of it.
        use_local_output: Return this rank's tensor instead of a DTensor.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts or Shard(-1), output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _install(module, device_mesh, "rowwise", Shard(-1), Partial(), self)


@torch.no_grad()
def shard(
    layer: QuantLinear,
    kind: str,
    rank: int,
    ranks: int,
    parts: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Cut a layer down to what one rank holds of it, in place.

    ``infeatures`` and ``outfeatures`` become those of the part, ``in_features`` and ``out_features`` stay those of
    the whole, as they do for a DTensor. The bias of a row-wise layer goes to the first rank, because outputs are
    summed.

    Args:
        layer: A whole layer.
        kind: "colwise", "rowwise", "packed_colwise" for two equal layers side by side, each cut by itself, or
            "replicate" for all of it.
        rank: This one.
        ranks: How many.
        parts: The layer's tensors or slices of an open safetensors file; default: its own.
        device: Where the part goes; default: where the layer is.

    Raises:
        ValueError: A rank would hold nothing, or kind is unknown.
    """
    K, N = layer.infeatures, layer.outfeatures
    columns: Sequence[range] | None = None
    rows: range | None = None
    if kind == "colwise":
        columns = [chunk(N, rank, ranks, "outfeatures")]
    elif kind == "packed_colwise":
        run = chunk(N // 2, rank, ranks, "outfeatures / 2")
        columns = [run, range(N // 2 + run.start, N // 2 + run.stop)]
    elif kind == "rowwise":
        rows = chunk(K, rank, ranks, "infeatures")
    elif kind != "replicate":
        raise ValueError(f"kind must be 'colwise', 'packed_colwise', 'rowwise' or 'replicate', got {kind!r}")
    if parts is None:
        parts = {name: tensor for name, tensor in layer.state_dict().items() if name in _PARTS}
    weight, bias = cut(parts, layer.spec, (K, N), layer.checkpoint_format, rows, columns)
    own = QuantLinear.from_packed(weight, bias if rows is None or rank == 0 else None).to(device or _device(layer))
    take_over(layer, own)
    layer.in_features, layer.out_features = K, N


def take_over(layer: nn.Module, own: QuantLinear) -> None:
    """Make a module another layer, in place: its hooks, and references to it, stay."""
    taken = {name: value for name, value in vars(own).items() if name in _BUFFERS or name not in _OF_ANY_MODULE}
    vars(layer).update(taken)


def is_shard(layer: QuantLinear) -> bool:
    """Whether the layer is a part of one."""
    return (layer.infeatures, layer.outfeatures) != (layer.in_features, layer.out_features)


def _install(
    module: nn.Module, mesh: DeviceMesh, kind: str, takes: Placement, makes: Placement, style: Any
) -> nn.Module:
    """Cut the layer; turn what it is given into what it takes, and what it makes into what is wanted."""
    if not isinstance(module, QuantLinear):
        raise TypeError(f"{type(style).__name__} is for QuantLinear, got {type(module).__name__}")
    shard(module, kind, mesh.get_local_rank(), mesh.size())

    def before(layer: QuantLinear, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not isinstance(x, DTensor):
            x = _global(x, mesh, style.input_layouts, layer.in_features)
        # what an output column contributes to dx is a part of a sum
        grads = [Partial()] if kind == "colwise" else [Shard(x.dim() - 1)]
        return (x.redistribute(placements=[takes]).to_local(grad_placements=grads), *args[1:])

    def after(layer: QuantLinear, args: tuple[Any, ...], y: Tensor) -> Tensor:
        spread = _global(y, mesh, makes, layer.out_features).redistribute(placements=[style.output_layouts])
        return spread.to_local() if style.use_local_output else spread

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
    if kind == "colwise" and style.output_layouts == makes and style.use_local_output:  # y stays as it is
        module.split = Split((mesh, style.input_layouts), before)
    return module


def _global(local: Tensor, mesh: DeviceMesh, placement: Placement, features: int) -> DTensor:
    """The DTensor that this rank's tensor belongs to; the ranks' parts need not be equal."""
    if not (isinstance(placement, Shard) and placement.dim in (-1, local.dim() - 1)):
        return DTensor.from_local(local, mesh, [placement], run_check=False)
    shape = (*local.shape[:-1], features)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)


def _device(layer: QuantLinear) -> torch.device:
    return next(layer.buffers()).device
