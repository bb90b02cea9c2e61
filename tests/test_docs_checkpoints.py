"""The pages on checkpoints and numerics say what the code and the tests hold."""

import re
from pathlib import Path

import torch

from gptq_triton.bounds import coefficients
from gptq_triton.cli import _parser
from gptq_triton.spec import BITS

ROOT = Path(__file__).parent.parent
DOCS = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}


def test_every_trap_has_its_tests_and_every_test_its_trap():
    written = set(re.findall(r"^def (test_trap_\w+)", (ROOT / "tests" / "test_traps.py").read_text(), re.MULTILINE))
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", DOCS["traps"], re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 15))
    named: list[str] = []
    for number, tests in rows:
        found = re.findall(r"`(\w+)`", tests)
        assert found
        assert all(name.startswith(f"test_trap_{int(number):02d}_") for name in found)
        named += found
    assert set(named) == written
    assert len(named) == len(written)


def test_the_factors_of_the_bound_are_those_of_the_code():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for names, scale_dtype in (("float16 or bfloat16", torch.float16), ("float32", torch.float32)):
            factors = []
            for bits in BITS:
                e, c = coefficients(dtype, scale_dtype, bits)
                factors.append(f"{e + 4097 * c * (1 + 4096 * c) * (1 + e):.2e}")
            assert f"| {str(dtype)[6:]} | {names} | {' | '.join(factors)} | {e:.2e} |" in DOCS["numerics"]
            assert coefficients(dtype, torch.bfloat16, 8) == coefficients(dtype, torch.float16, 8)


def test_commands_and_files_that_pages_name_exist():
    commands = _parser()._subparsers._group_actions[0].choices  # pyright: ignore
    for text in DOCS.values():
        for command in re.findall(r"gptq-triton ([a-z]+)", text):
            assert command in commands
        for path in re.findall(r"`((?:tests|bench)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), path
        for link in re.findall(r"\]\(([\w./-]+\.md)\)", text):
            assert (ROOT / "docs" / link).exists(), link
