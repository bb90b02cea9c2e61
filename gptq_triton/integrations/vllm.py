"""A vLLM plugin: GPTQ checkpoints that vLLM itself no longer reads, on this package's layers.

vLLM loads it by the entry point ``vllm.general_plugins``. Asymmetric, 2- and 3-bit, act-order and v2 checkpoints come
here by themselves; symmetric 4- and 8-bit ones with ``quantization="gptq_triton"``. Mixture-of-experts layers and
quantized heads are refused.
"""

# pyright: reportMissingImports=false
# vLLM pins a torch of its own and is not installed where this is checked

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vllm.transformers_utils.config import get_safetensors_params_metadata

from gptq_triton.config import QuantizeConfig
from gptq_triton.linear import QuantLinear

from .pieces import Piece, is_orphan, side_by_side

NAME = "gptq_triton"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def register() -> None:
    """What the entry point runs, in every process and perhaps more than once."""
    if NAME not in QUANTIZATION_METHODS:
        register_quantization_config(NAME)(GptqTritonVllmConfig)


class GptqTritonVllmConfig(QuantizationConfig):
    """vLLM's view of a GPTQ checkpoint."""

    def __init__(self, config: QuantizeConfig):
        super().__init__()
        self.config = config
        self.quantized: set[str] | None = None  # names of layers, where the files could be read

    def get_name(self) -> Any:
        """The name users give as ``quantization``."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the kernels take."""
        return [torch.half, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere, the oldest that kernels are compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Where AutoGPTQ describes a checkpoint."""
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GptqTritonVllmConfig:
        """Read a checkpoint's quantization config."""
        return cls(QuantizeConfig.from_dict(config))

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None) -> Any:
        """Claim what nobody else reads, and what is asked for by name."""
        method = str(hf_quant_cfg.get("quant_method", "")).lower()
        if method not in ("gptq", NAME) or user_quant not in (None, NAME):
            return None
        return NAME if NAME in (method, user_quant) or is_orphan(hf_quant_cfg) else None

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        """Keep g_idx, which vLLM would drop."""
        return WeightsMapper()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Note which layers the files hold quantized."""
        names = get_safetensors_params_metadata(model_name, revision=revision)
        found = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
        self.quantized = found or None

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Call layers what vLLM calls them."""
        if self.quantized is not None:
            self.quantized = set(hf_to_vllm_mapper.apply_list(sorted(self.quantized)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of one layer, or None where vLLM's default serves."""
        if not isinstance(layer, (LinearBase, RoutedExperts, ParallelLMHead)):
            return None
        if isinstance(layer, RoutedExperts):
            if self.quantized is None or any(name.startswith(prefix) for name in self.quantized):
                raise ValueError(f"{prefix}: quantized experts are not supported")
            return None
        configs = self.configs(prefix)
        if not any(configs):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if isinstance(layer, ParallelLMHead):
            raise ValueError(f"{prefix}: a quantized output head is not supported")
        if not all(configs):
            raise ValueError(f"{prefix}: some of the layers that vLLM joins are quantized and some are not")
        return GptqTritonLinearMethod([config for config in configs if config is not None])

    def configs(self, prefix: str) -> list[QuantizeConfig | None]:
        """The configuration of each checkpoint layer that vLLM joins under a name; None for floating ones."""
        parent, _, leaf = prefix.rpartition(".")
        names = [f"{parent}.{own}" if parent else own for own in self.packed_modules_mapping.get(leaf, [leaf])]
        if self.quantized is not None and prefix in self.quantized:  # joined in the checkpoint, too
            names = [prefix]
        head = names[0].rpartition(".")[2] == "lm_head" and not self.config.lm_head
        held = [name in self.quantized if self.quantized is not None else not head for name in names]
        return [
            self.config.for_module(name) if quantized else None for name, quantized in zip(names, held, strict=True)
        ]


class GptqTritonLinearMethod(LinearMethodBase):
    """Linear layers of vLLM over QuantLinear.

    Args:
        configs: Of the checkpoint layers that vLLM joins, or of the one that is joined in the checkpoint.
    """

    def __init__(self, configs: Sequence[QuantizeConfig]):
        self.configs = configs

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make empty parameters, whose loaders cut what comes down to this rank's part."""
        own: Any = layer
        rank = getattr(own, "tp_rank", 0)
        split = input_size_per_partition != input_size
        first = rank * input_size_per_partition if split else 0
        rows = range(first, first + input_size_per_partition)
        ranks = 1 if split else getattr(own, "tp_size", 1)
        places = []  # of each joined layer: its whole size, and what this rank has of it
        for index, size in enumerate(output_partition_sizes):
            replicas = getattr(own, "num_kv_head_replicas", 1) if index and len(output_partition_sizes) == 3 else 1
            start = 0 if split else rank // replicas * size
            places.append((size * ranks // replicas, range(start, start + size)))
        own.pieces = {}
        device = torch.get_default_device()

        def piece(shard: Any) -> Piece:
            if shard not in own.pieces:
                index = {"q": 0, "k": 1, "v": 2}.get(shard, shard)
                if index is None:  # one layer, or several joined in the checkpoint
                    columns, width = [], 0
                    for whole, kept in places:
                        columns.append(range(width + kept.start, width + kept.stop))
                        width += whole
                else:
                    width, columns = places[index][0], [places[index][1]]
                config = self.configs[index or 0] if len(self.configs) > 1 else self.configs[0]
                own.pieces[shard] = Piece(config, (input_size, width), rows, columns)
            return own.pieces[shard]

        for part in _PARTS:

            def load(_: Any, loaded: Tensor, shard: Any = None, part: str = part) -> None:
                piece(shard).take(part, loaded, device)

            dtype = params_dtype if part == "scales" else torch.int32
            parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            parameter.weight_loader = load
            layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Turn what came into layers, one where groups allow."""
        own: Any = layer
        order = {"q": 0, "k": 1, "v": 2}
        pieces: Mapping[Any, Piece] = own.pieces
        if not pieces:
            raise ValueError(f"{getattr(own, 'prefix', 'a layer')}: no quantized tensor came with the checkpoint")
        weights = [pieces[key].weight() for key in sorted(pieces, key=lambda key: order.get(key, key) or 0)]
        for part in _PARTS:
            delattr(layer, part)
        own.pieces = {}
        own.gptq = nn.ModuleList(QuantLinear.from_packed(weight) for weight in side_by_side(weights))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear map."""
        own: Any = layer
        parts = [part(x) for part in own.gptq]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return y if bias is None else y + bias
