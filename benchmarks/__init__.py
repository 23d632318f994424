"""What speed and memory claims rest on: each script prints a table and writes JSON."""

import os

# Torch reads them when it is imported: its profiler and allocator would write between tables.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
