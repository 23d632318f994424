"""Triton's kernels in the interpreter where there is no GPU; engines only with their package."""

import os
from importlib.util import find_spec

import torch

# Triton reads this when it is first imported, so it must be set before any test is collected.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Doctests import every module of the package.
NEEDS = {
    "triton": ["givens/kernels"],
    "numba": [
        "native",
        "givens/compiled",
        "givens/lanes",
        "givens/program",
        "splines/compiled",
        "splines/loops",
    ],
}
collect_ignore = [
    f"flows/{module}.py"
    for package, modules in NEEDS.items()
    if not find_spec(package)
    for module in modules
]
