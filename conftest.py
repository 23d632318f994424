"""Triton's kernels run in the interpreter where there is no GPU."""

import os

import torch

# Triton reads this when it is first imported, so it must be set before any test is collected.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
