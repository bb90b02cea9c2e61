"""For every test."""

import torch

# Two threads on matrices this small wait for each other longer than one computes: 40 times longer where
# two processes share two cores.
torch.set_num_threads(1)
