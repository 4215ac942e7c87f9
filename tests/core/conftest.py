"""Helper modules of these tests (`reference`, `broken`, `support`) are imported by their bare names."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
# Small tensors: more threads would only spin against each other, and their time would be counted.
torch.set_num_threads(1)
