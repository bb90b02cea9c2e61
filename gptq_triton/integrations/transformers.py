"""GPTQ models in transformers: import this module, then use ``from_pretrained`` as ever.

The import makes transformers load every GPTQ folder into :class:`gptq_triton.QuantLinear`, without optimum
and gptqmodel; :func:`release_gptq` gives ``quant_method: "gptq"`` back to transformers' own loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from gptq_triton.checkpoint import storable_state
from gptq_triton.config import read_config
from gptq_triton.dialects import detect
from gptq_triton.embedding import QuantEmbedding, make_layers, untie
from gptq_triton.evaluate import tokenize
from gptq_triton.experts import match_checkpoint
from gptq_triton.files import Files
from gptq_triton.filling import matrix_shape, read_layer, report
from gptq_triton.findings import Claim, Layout, corrected
from gptq_triton.fusing import stored_layers, unfuse
from gptq_triton.linear import QuantLinear
from gptq_triton.model import quantize_model
from gptq_triton.parts import PARTS, LayerParts, layer_parts
from gptq_triton.tensorfile import open_tensors

from .tensor_parallel import is_shard, take_over
from .transformers_config import GptqTritonConfig
from .transformers_parallel import adapt_plan, read_shard, tp_mesh

__all__ = ["GptqTritonConfig", "GptqTritonQuantizer", "autogptq_config", "claim_gptq", "release_gptq"]

_STOCK = AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"]


class GptqTritonQuantizer(HfQuantizer):
    """Loads GPTQ checkpoints into QuantLinear layers, and quantizes floating ones as they are loaded.

    transformers makes and calls it; see its :class:`~transformers.quantizers.HfQuantizer` for when.
    """

    requires_calibration = False
    quantization_config: GptqTritonConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        if not isinstance(quantization_config, GptqTritonConfig):
            quantization_config = GptqTritonConfig(**quantization_config.to_dict())
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, str] = {}  # module name to name in the checkpoint
        self._names: set[str] = set()  # of the model's state dict, with its quantized layers in place
        self._files: list[Path] = []
        self._target: torch.device | None = None  # where a model that is quantized here ends up

    def update_device_map(self, device_map: Any) -> Any:
        """Load on the CPU what is to be quantized: blocks go to the GPU one at a time."""
        if self.pre_quantized or device_map is None:
            return device_map
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {gpu}
        if len(places) > 1:
            raise ValueError(
                f"device_map must name one device for a model that is quantized as it is loaded, got {device_map}; "
                "save it, then load it across devices"
            )
        self._target = torch.device(places.pop())
        return {"": torch.device("cpu")}

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        """Experts that were taken apart are not put together again."""
        arguments = (weight_conversions,) if model is None else (weight_conversions, model)  # none before 5.23
        return [
            step
            for step in super().update_weight_conversions(*arguments)
            if not (
                self._layers and isinstance(step, WeightConverter) and _is_fusion(step) and not _has(self._names, step)
            )
        ]

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Parallel plans know the architecture's own modules only."""
        super().update_parallel_plan(model, plan)
        adapt_plan(model, plan)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        self._files = [Path(file) for file in checkpoint_files or ()]
        with _opened(self._files) as files:
            quantized = any(key.endswith(".qweight") for key in files)
            if self.pre_quantized:
                self._replace_layers(model, files)
        if self.pre_quantized:
            if not hasattr(HfQuantizer, "update_parallel_plan"):  # before transformers 5.23
                adapt_plan(model, model.tp_plan)
            return
        if quantized:
            raise ValueError(
                f"{self._files[0].parent} is quantized already, which its config.json does not say; "
                "load it with config=autogptq_config(folder) and without quantization_config"
            )
        if self.quantization_config.dataset is None:
            raise ValueError("dataset must be given to quantize a model as it is loaded, got None")

    def _replace_layers(self, model: Any, files: Files) -> None:
        """Put empty layers where the checkpoint has quantized ones, which transformers then leaves alone."""
        config = self.quantization_config.to_quantize_config()
        found = layer_parts(files)
        place = match_checkpoint(model, files)
        modules = {name for name, _ in model.named_modules()}
        split = getattr(getattr(model.config, "distributed_config", None), "tp_size", 1) > 1  # known from 5.23 on
        for name in found:
            own_name = _in_model(place[f"{name}.qweight"].removesuffix(".qweight"), model, modules)
            if own_name not in modules:
                raise ValueError(f"{found[name].path.name} holds {name}, which the model has no place for")
            own = Claim.of(config, name, own_name)
            make_layers(model, [own_name], own.bits or config.bits, own.group_size or -1, device="meta")
            layer: Any = model.get_submodule(own_name)
            # of use for a device map only, and held whole by no rank
            layer._non_persistent_buffers_set.update(PARTS)
            layer._hf_quantized_needs_local_tp = True  # transformers' parallel styles then use plain tensors
            if split:
                layer._buffers.update(dict.fromkeys(set(PARTS) - {"bias"}))
            self._layers[own_name] = name
        for module in model.modules():  # some architectures would initialize `weight` of layers that have none now
            bare = not module._parameters and not module._buffers
            if bare and any(isinstance(child, QuantLinear) for child in module.modules()):
                module._is_hf_initialized = True
        untie(model, self._layers)
        self._names = set(model.state_dict())
        names = "|".join(map(re.escape, {*self._layers, *self._layers.values()}))
        ignored = rf"^(?:{names})\.(?:{'|'.join(PARTS)})$"
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), ignored}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return self._fill(model) if self.pre_quantized else self._quantize(model)

    def _fill(self, model: Any) -> Any:
        """Read the quantized layers one by one, each to where the device map has its place."""
        config = self.quantization_config.to_quantize_config()
        layouts: dict[str, Layout] = {}
        with _opened(self._files) as files:
            found = layer_parts(files)
            for name, source in self._layers.items():
                layer = cast("QuantLinear", model.get_submodule(name))
                layouts[name] = self._read(model, name, layer, found[source], Claim.of(config, source, name))
        report(Path(model.name_or_path), layouts)
        formats = {layer.checkpoint_format for layer in model.modules() if isinstance(layer, QuantLinear)}
        label = formats.pop() if len(formats) == 1 else "gptq_v2"  # one label for all, as it will be saved
        self.quantization_config.set_quantize_config(replace(corrected(config, layouts), checkpoint_format=label))
        return model

    def _read(self, model: Any, name: str, layer: QuantLinear, part: LayerParts, claim: Claim) -> Layout:
        mesh = tp_mesh(model)
        if mesh is not None:
            layout = detect(part, claim, shape=matrix_shape(layer))
            take_over(layer, read_shard(model, mesh, name, layer, layout, part))
            return layout
        device = layer.g_idx.device
        if device.type == "meta":
            raise ValueError(f"{name} is offloaded; quantized layers run on the device that holds them")
        layout, own = read_layer(part, layer, claim)
        take_over(layer, own.to(device))
        return layout

    def _quantize(self, model: Any) -> Any:
        config = self.quantization_config
        quantize_model(model, _calibration(model, config), config.to_quantize_config())
        model.config.quantization_config = config
        config.dataset = None  # it has done its work; a saved or copied config should not carry it
        return model if self._target is None else model.to(self._target)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called before a model is saved: its config must say what the layers are."""
        layers = stored_layers(model)
        _check_whole(layers)
        state, label = storable_state(model, layers)
        self.quantization_config.desc_act = any(layer.act_order for layer in layers.values())
        self.quantization_config.checkpoint_format = label
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Put a floating layer, of the kind the architecture has there, in place of every quantized one."""
        if isinstance(dtype, str):  # as a config that was saved has it
            dtype = cast("torch.dtype", getattr(torch, dtype))
        unfuse(model)
        _check_whole({name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)})
        with torch.device("meta"):
            plain = dict(type(model)(model.config).named_modules())
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                model.set_submodule(name, _floating(layer, plain.get(name), dtype))
        return model

    def is_serializable(self) -> Any:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Whether adapters can be trained on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the model."""
        return True


def claim_gptq() -> None:
    """Let this package load what says ``quant_method: "gptq"``. Done by importing the module."""
    AUTO_QUANTIZER_MAPPING["gptq"] = GptqTritonQuantizer
    AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GptqTritonConfig


def release_gptq() -> None:
    """Give ``quant_method: "gptq"`` back to transformers' own loader; "gptq_triton" stays with this package."""
    AUTO_QUANTIZER_MAPPING["gptq"], AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _STOCK


def autogptq_config(folder: str | Path) -> PreTrainedConfig:
    """The config of a folder that AutoGPTQ wrote, in which transformers does not find its way.

    Such folders describe the quantization in ``quantize_config.json`` only and call the weights
    ``gptq_model-4bit-128g.safetensors`` or the like. Give the result to ``from_pretrained`` as ``config``.

    Raises:
        ValueError: The folder describes no GPTQ model, or holds several.
    """
    folder = Path(folder)
    config: Any = AutoConfig.from_pretrained(folder)
    config.quantization_config = read_config(folder).to_dict()
    files = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{folder} must hold one model, got {[file.name for file in files]}")
    config.transformers_weights = files[0].name
    return config


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[Files]:
    """Tensor name to the open file that holds it."""
    with ExitStack() as stack:
        files = [stack.enter_context(open_tensors(path)) for path in paths]
        yield {key: file for file in files for key in file.entries}


def _in_model(name: str, model: PreTrainedModel, modules: set[str]) -> str:
    """A module's name in a model that is the body, or has the body, of the one that was saved."""
    prefix = model.base_model_prefix + "."
    if name not in modules:
        for other in (name.removeprefix(prefix), prefix + name):
            if other in modules:
                return other
    return name


def _check_whole(layers: Mapping[str, QuantLinear]) -> None:
    cut = next((name for name, layer in layers.items() if is_shard(layer)), None)
    if cut is not None:
        raise ValueError(f"{cut} is one rank's part of a layer; load the model on one device to save or dequantize it")


def _is_fusion(step: WeightConverter) -> bool:
    return any("*" in pattern for pattern in step.source_patterns)


def _has(names: set[str], step: WeightConverter) -> bool:
    return any(name.endswith(target) for target in step.target_patterns for name in names)


def _calibration(model: Any, config: GptqTritonConfig) -> list[Any]:
    """The dataset with texts turned into token ids."""
    items = list(config.dataset or ())
    if not any(isinstance(item, str) for item in items):
        return items
    tokenizer: Any = config.tokenizer or model.name_or_path
    if isinstance(tokenizer, str):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
    length = config.model_seqlen or min(most, 2048)
    texts = [tokenize(tokenizer, item) if isinstance(item, str) else item for item in items]
    return [text.segment(0, length) if hasattr(text, "segment") else text for text in texts]


def _floating(layer: QuantLinear, plain: nn.Module | None, dtype: torch.dtype | None) -> nn.Module:
    """The layer in floats, in the module that the architecture has there (an expert's is a linear layer)."""
    weight = layer.dequantize(dtype)
    with torch.device("meta"):
        made: Any = plain or nn.Linear(layer.infeatures, layer.outfeatures, bias=layer.bias is not None)
    made.weight = nn.Parameter((weight.t() if isinstance(made, Conv1D) else weight).contiguous())
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.to(weight.dtype, copy=True))
    if isinstance(layer, QuantEmbedding) and layer.factor != 1.0:
        made.embed_scale = torch.tensor(layer.factor, device=weight.device)
    return made


register_quantizer("gptq_triton")(GptqTritonQuantizer)
register_quantization_config("gptq_triton")(GptqTritonConfig)
claim_gptq()
