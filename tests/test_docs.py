"""What the README says is what the repository holds."""

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import nn

import gptq_triton

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_fresh():
    done = subprocess.run([sys.executable, "bench/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_opens_with_the_two_commands():
    commands = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert {*commands, *re.findall(r"`make ([\w-]+)`", README)} <= {*targets}


def test_every_name_the_readme_imports_exists():
    for names in re.findall(r"from gptq_triton import (.*)", README):
        for name in names.split(", "):
            assert hasattr(gptq_triton, name), name
    assert sorted(gptq_triton.__all__) == gptq_triton.__all__


def test_the_one_layer_example_runs():
    linear, x = nn.Linear(64, 32), torch.randn(3, 64)
    quantizer = gptq_triton.Quantizer()
    quantizer.configure(4, perchannel=True, sym=False)
    quantizer.find_params(linear.weight, weight=True)
    layer = gptq_triton.QuantLinear(4, -1, linear.in_features, linear.out_features)
    layer.pack(linear, quantizer.scale, quantizer.zero)
    step = quantizer.scale.max().item()
    assert (layer(x) - linear(x)).abs().max() <= step * x.abs().sum(1).max()


def test_importing_touches_no_gpu_no_kernel_and_no_extra():
    code = (
        "import sys, torch, gptq_triton;"
        "assert not torch.cuda.is_initialized();"
        "found = {'triton', 'transformers', 'accelerate'} & set(sys.modules);"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_documentation_builds_whole(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert all(f'id="gptq_triton.{name}"' in api for name in gptq_triton.__all__)
    figures = (tmp_path / "benchmarks" / "index.html").read_text()
    assert all(text in figures for text in ("yes", "x humming", "KL handbook", "fraction of the floor (20)"))
    for picture in re.findall(r'<img[^>]* src="\.\./([^"]*)"', figures):
        ElementTree.fromstring((tmp_path / picture).read_text())
    for picture in ("words-4", "words-3", "tiles", "quality"):
        ElementTree.fromstring((tmp_path / f"{picture}.svg").read_text())
    # 3-bit codes 10 and 21 lie across words, the others do not
    labels = re.findall(r'fill="#fff">(\d+)</text>', (tmp_path / "words-3.svg").read_text())
    assert sorted(label for label in labels if labels.count(label) == 2) == ["10", "10", "21", "21"]
