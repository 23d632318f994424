"""The states of the random generators that work on a device draws from."""

import torch
from torch import Tensor

__all__ = ["noise_since", "random_state", "seed", "set_random_state"]


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """That of the CPU, and on another device its own."""
    if device.type == "cpu":
        return (torch.get_rng_state(),)
    if device.type == "mps":  # there is one only
        return torch.get_rng_state(), torch.mps.get_rng_state()
    return torch.get_rng_state(), torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: tuple[Tensor, ...]) -> None:
    """Go back to what :func:`random_state` returned."""
    torch.set_rng_state(state[0])
    if device.type == "mps":
        torch.mps.set_rng_state(state[1])
    elif device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[1], device)


def noise_since(device: torch.device, state: tuple[Tensor, ...]) -> bool:
    """Whether anything was drawn since then."""
    # As integers, a fraction of the time that bytes take.
    pairs = zip(state, random_state(device), strict=True)
    return not all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def seed(device: torch.device, value: int) -> None:
    """Seed those generators, in a few microseconds; ``torch.manual_seed`` asks every device."""
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)
