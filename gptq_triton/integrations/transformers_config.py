"""GptqTritonConfig: what transformers knows about a quantized model, every field of its files included."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import GPTQConfig
from transformers.utils.quantization_config import QuantizationMethod

from gptq_triton.config import UNSAID, QuantizeConfig

# transformers' own arguments: how to quantize here and now, which is no property of the result
_ARGUMENTS = ("tokenizer", "dataset")
_LABELS = {"checkpoint_format", "format"}
_STOCK = {
    name: parameter.default
    for name, parameter in inspect.signature(GPTQConfig.__init__).parameters.items()
    if parameter.default is not parameter.empty and name not in ("act_group_aware", "format")
}


class GptqTritonConfig(GPTQConfig):
    """transformers' configuration of a GPTQ model, for loading one and for making one.

    Takes what :class:`gptq_triton.QuantizeConfig` takes, under the names of any GPTQ tool, and keeps what
    it does not know, so that no field of a checkpoint is lost by loading and saving it.

    Args:
        bits: 2, 3, 4 or 8.
        tokenizer: For a dataset of texts; a tokenizer or its name. Default: that of the model.
        dataset: Calibration, when a model is quantized as it is loaded: texts, or token ids (S,) or (B, S) as
            tensors or lists, or mappings with ``input_ids`` and optionally ``attention_mask``. Datasets
            are not downloaded by name.
        model_seqlen: Most tokens that are used of a text; default: 2048, or what the model can take.
        quant_method: What ``config.json`` calls the method. "gptq" is understood by every GPTQ reader;
            "gptq_triton" makes transformers load the folder with this package only.
        fields: Of :class:`gptq_triton.QuantizeConfig` and of any checkpoint: ``group_size``, ``sym``,
            ``desc_act``, ``static_groups``, ``dynamic``, ``lm_head``, ...

    Raises:
        ValueError: A field is out of range, or describes another kind of checkpoint.
        TypeError: A field is not of its type.
    """

    checkpoint_format: str
    group_aware: bool
    extra: Mapping[str, Any]

    def __init__(
        self,
        bits: int = 4,
        tokenizer: Any = None,
        dataset: Sequence[Any] | None = None,
        *,
        model_seqlen: int | None = None,
        quant_method: str = "gptq",
        **fields: Any,
    ):
        fields |= {} if model_seqlen is None else {"model_seqlen": model_seqlen}
        method = str(getattr(quant_method, "value", quant_method))
        # "": by the symmetry of the weights, as in QuantizeConfig
        label = {} if _LABELS & set(fields) else {"checkpoint_format": ""}
        self.__dict__.update({name: fields.get(name, default) for name, default in _STOCK.items()})
        config = QuantizeConfig.from_dict({"bits": bits, "quant_method": method} | label | fields)
        if dataset is not None:  # what a file leaves unsaid was not done, but this is to be made
            unsaid = {name: getattr(QuantizeConfig, name) for name in UNSAID.keys() - fields.keys()}
            config = dataclasses.replace(config, **unsaid)
        self.set_quantize_config(config)
        self.tokenizer, self.dataset = tokenizer, dataset
        self.quant_method = cast("Any", QuantizationMethod.GPTQ if method == "gptq" else method)
        self.post_init()

    def post_init(self) -> None:
        """Check the arguments that are transformers' own."""
        if self.quant_method not in ("gptq", "gptq_triton"):
            raise ValueError(f"quant_method must be 'gptq' or 'gptq_triton', got {self.quant_method!r}")
        if isinstance(self.dataset, (str, bytes, Mapping)):
            raise ValueError(
                f"dataset must be a sequence of texts or token ids, got {self.dataset!r}; datasets are not "
                "downloaded by name"
            )
        if self.model_seqlen is not None and self.model_seqlen < 1:
            raise ValueError(f"model_seqlen must be at least 1, got {self.model_seqlen}")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read the ``quantization_config`` of a checkpoint, where no label means v1."""
        fields = {"checkpoint_format": "gptq"} if not _LABELS & set(config_dict) else {}
        fields |= {name: value for name, value in config_dict.items() if name not in _ARGUMENTS}
        made: Any = super().from_dict(fields, return_unused_kwargs, **kwargs)
        config = made[0] if return_unused_kwargs else made
        # what optimum calibrated on is a fact about the checkpoint, not an order
        config.extra = {**config.extra, **{name: config_dict[name] for name in _ARGUMENTS if name in config_dict}}
        return made

    @property
    def format(self) -> str:
        """transformers' name for ``checkpoint_format``."""
        return self.checkpoint_format

    @property
    def act_group_aware(self) -> bool:
        """transformers' name for ``group_aware``."""
        return self.group_aware and not self.desc_act

    def to_quantize_config(self) -> QuantizeConfig:
        """The same as the rest of this package takes it."""
        return QuantizeConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(QuantizeConfig)})

    def set_quantize_config(self, config: QuantizeConfig) -> None:
        """Take over every field."""
        self.__dict__.update({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: every field of the checkpoint and nothing of this run."""
        method = str(getattr(self.quant_method, "value", self.quant_method))
        return self.to_quantize_config().to_dict() | {"quant_method": method}
