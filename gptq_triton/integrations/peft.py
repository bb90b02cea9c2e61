"""LoRA and DoRA over quantized layers, through PEFT's registration of custom modules."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_triton.embedding import QuantEmbedding
from gptq_triton.fusing import FusedPart
from gptq_triton.linear import QuantLinear

__all__ = ["LoraQuantLinear", "register"]

_FUSED = "fuse() has merged layers of the model, which take no adapters; unfuse(model) first"


def register(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Let a LoRA configuration put adapters on QuantLinear layers.

    Args:
        config: For ``get_peft_model``, ``PeftModel.from_pretrained(..., config=...)`` or ``model.add_adapter``.
            PEFT does not save the registration: register a config that was loaded, too.
        model: The model it is for. Needed for ``target_modules="all-linear"`` only, which PEFT takes to
            mean nn.Linear; it becomes a list of names here.

    Returns:
        The same configuration.

    Raises:
        ValueError: ``target_modules`` is "all-linear" and there is no model, or layers of the model are merged.
    """
    if model is not None and any(isinstance(module, FusedPart) for module in model.modules()):
        raise ValueError(_FUSED)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        if model is None:
            raise ValueError("target_modules is 'all-linear': register(config, model) needs the model to find them")
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        layers = (QuantLinear, nn.Linear, Conv1D)
        found = {n: m for n, m in model.named_modules() if isinstance(m, layers) and m is not head}
        config.target_modules = [name for name, layer in found.items() if not isinstance(layer, QuantEmbedding)]
    config._register_custom_module({QuantLinear: LoraQuantLinear, FusedPart: _refuse})  # pyright: ignore[reportArgumentType]
    return config


def _refuse(*args: Any, **kwargs: Any) -> nn.Module:
    """In place of an adapter for a part of a merged layer."""
    raise ValueError(_FUSED)


class LoraQuantLinear(LoraLinear):
    """PEFT's LoRA layer around a QuantLinear, made by PEFT for a registered configuration.

    The quantized weight is frozen and never dequantized in a forward pass, DoRA's included. It cannot take
    an adapter up as it is: its codes have to be rounded anew.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """What PEFT can ask of this layer: LoRA and DoRA."""
        return {(): None, ("use_dora",): _Dora}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "an adapter cannot be merged into a quantized layer as it is. Save it, unload() it and let "
            "gptq_triton.merge_lora(model, folder) round the codes anew, or dequantize() the model and merge there"
        )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return next(base_layer.buffers()).device, None  # whichever form the weight is in


class _Dora(DoraLinearVariant):
    """DoRA whose weight norms come from products with the quantized weight."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = _Magnitude(fan_in_fan_out=False)
        lora_A, lora_B = module.lora_A[adapter_name], module.lora_B[adapter_name]
        layer.measure(module.get_base_layer(), lora_A, lora_B, module.scaling[adapter_name])
        module.lora_magnitude_vector[adapter_name] = layer


class _Magnitude(DoraLinearLayer):
    """DoRA's magnitudes (N,), and the norms of the rows of ``W + s * B @ A`` without ever forming W.

    ``|w + s b A|^2 = |w|^2 + 2 s b.(A w) + s^2 b (A A^T) b``, where ``A w`` is the layer applied to A.
    """

    squares: Tensor

    def measure(self, base: QuantLinear, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float) -> None:
        """Note the norms of the base weight; start from magnitudes that change nothing."""
        wide = torch.promote_types(lora_A.weight.dtype, torch.float32)
        self.register_buffer("squares", base.dequantize(wide).square().sum(1), persistent=False)
        self.weight = nn.Parameter(self.norms(base, lora_A, lora_B, scaling).to(lora_A.weight.dtype))

    @torch.no_grad()
    def norms(self, base: QuantLinear, lora_A: nn.Linear, lora_B: nn.Linear, scaling: float) -> Tensor:
        """The norm of each row of the adapted weight, (N,); the paper takes it for a constant."""
        a, b = lora_A.weight.to(self.squares.dtype), lora_B.weight.to(self.squares.dtype)
        with torch.autocast(a.device.type, enabled=False):
            product = base(a) if base.bias is None else base(a) - base.bias
            cross = (b * product.t()).sum(1)
            own = ((b @ (a @ a.t())) * b).sum(1)
        return (self.squares + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        *,
        lora_A: nn.Linear,
        lora_B: nn.Linear,
        scaling: float,
        base_layer: QuantLinear,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """What to add to the output of the base layer."""
        ratio = self.weight / self.norms(base_layer, lora_A, lora_B, scaling).to(self.weight.dtype)
        plain = base_layer(x) if base_result is None else base_result
        if base_layer.bias is not None:
            plain = plain - base_layer.bias
        return (ratio - 1) * plain + ratio * lora_B(lora_A(x)) * scaling
