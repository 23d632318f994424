import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def same_every_time():
    """One thread, one seed, and memory filled with NaN where torch.empty leaves it unset."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def no_type_hook(monkeypatch):
    """Turn off the test run's own type checks, so that bad arguments reach our door."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
