"""Work beside other work, as far as a CPU has it."""

import torch

from gptq_triton.aside import Aside

CPU = torch.device("cpu")


def test_a_cpu_does_it_at_once():
    aside, seen = Aside(CPU, "test"), []
    assert aside.run(lambda: seen.append(1) or 7) == 7
    assert seen == [1]
    aside.join()
