import pytest
import torch


@pytest.fixture(autouse=True)
def unset_memory_is_nan():
    """So that an element nobody writes is noticed: torch.empty returns NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
