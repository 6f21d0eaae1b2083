"""Shared by all tests."""

import torch

# Tiny models gain nothing from a second thread, and lose much where other work shares the cores.
torch.set_num_threads(1)
