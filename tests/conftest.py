"""For every test."""

import torch
from hypothesis import settings

# Two threads on matrices this small wait for each other longer than one computes: 40 times longer where
# two processes share two cores.
torch.set_num_threads(1)

# how long an example takes says more about the machine's other work than about the code
settings.register_profile("patient", deadline=None)
settings.register_profile("deep", deadline=None, max_examples=20_000)  # for tests/test_fuzz.py alone
settings.load_profile("patient")
