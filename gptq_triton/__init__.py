"""GPTQ for PyTorch, whole: quantizer, solver, checkpoints and the Triton kernels that run them."""

from .checkpoint import load_quant, load_quantized, save_quantized
from .config import QuantizeConfig
from .conversion import convert_checkpoint
from .fusing import fuse, unfuse
from .inspection import inspect_checkpoint
from .layers import find_layers
from .layout import TiledWeight, tile_weight
from .linear import QuantLinear, make_quant, prepare
from .merging import MergeReport, merge_lora
from .model import estimate, quantize_model
from .packing import PackedWeight
from .quantizer import Quantizer, quantize
from .solver import GPTQ, SolverOptions
from .spec import QuantSpec
from .tuning import tune

__all__ = [
    "GPTQ",
    "MergeReport",
    "PackedWeight",
    "QuantLinear",
    "QuantSpec",
    "QuantizeConfig",
    "Quantizer",
    "SolverOptions",
    "TiledWeight",
    "convert_checkpoint",
    "estimate",
    "find_layers",
    "fuse",
    "inspect_checkpoint",
    "load_quant",
    "load_quantized",
    "make_quant",
    "merge_lora",
    "prepare",
    "quantize",
    "quantize_model",
    "save_quantized",
    "tile_weight",
    "tune",
    "unfuse",
]
__version__ = "0.1.0"
