"""ActNorm's initialization from the first batch."""

import pytest
import torch

from flows.transforms import ActNorm


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Channels with different means and deviations."""
    channels = torch.arange(1, shape[1] + 1, dtype=dtype).view(-1, *[1] * (len(shape) - 2))
    return channels.square() * torch.randn(*shape, dtype=dtype) - 3 * channels


@pytest.mark.parametrize("shape", [(200, 3), (20, 3, 4, 5)], ids=str)
def test_first_training_batch_gets_mean_0_and_deviation_1(shape):
    layer = ActNorm(3).double()
    outputs, logabsdet = layer(batch(*shape, dtype=torch.float64))
    columns = outputs.movedim(1, 0).flatten(1)
    torch.testing.assert_close(columns.mean(1), torch.zeros(3).double(), atol=1e-12, rtol=0)
    deviation = columns.std(1, correction=0)
    torch.testing.assert_close(deviation, torch.ones(3).double(), atol=1e-12, rtol=0)
    positions = outputs[0, 0].numel()
    expected = positions * layer.log_scale.sum().expand(shape[0])
    torch.testing.assert_close(logabsdet, expected)


def test_initializes_only_once():
    layer = ActNorm(3)
    assert not layer.initialized
    layer(batch(50, 3))
    assert layer.initialized
    kept = layer.log_scale.detach().clone(), layer.shift.detach().clone()
    layer(10 * batch(50, 3) + 7)
    assert torch.equal(layer.log_scale, kept[0]) and torch.equal(layer.shift, kept[1])


def test_neither_evaluation_nor_sampling_initializes():
    layer = ActNorm(3)
    x = batch(50, 3)
    layer.inverse(x)  # in training mode too
    layer.eval()
    assert torch.equal(layer(x)[0], x) and not layer.initialized


def test_a_loaded_layer_does_not_start_over():
    trained, loaded = ActNorm(3), ActNorm(3)
    trained(batch(50, 3))
    loaded.load_state_dict(trained.state_dict())
    other = 10 * batch(50, 3) + 7
    assert torch.equal(loaded.train()(other)[0], trained(other)[0])


def test_a_constant_feature_keeps_its_scale():
    x = torch.stack([torch.full((50,), 4.0), 100 * torch.randn(50)], dim=1)
    layer = ActNorm(2)
    outputs, _ = layer(x)
    assert layer.log_scale[0] == 0 and layer.log_scale[1] < -3
    assert torch.equal(outputs[:, 0], torch.zeros(50))


def test_one_row_is_centred_and_keeps_its_scale():
    layer = ActNorm(3)
    outputs, logabsdet = layer(torch.tensor([[1.0, -2.0, 3.0]]))
    assert torch.equal(outputs, torch.zeros(1, 3)) and torch.equal(logabsdet, torch.zeros(1))


def test_no_rows_initialize_nothing():
    layer = ActNorm(3)
    outputs, logabsdet = layer(torch.empty(0, 3))
    assert outputs.shape == (0, 3) and logabsdet.shape == (0,) and not layer.initialized


def test_initialization_is_no_part_of_the_gradient():
    layer = ActNorm(3)
    x = batch(50, 3).requires_grad_()
    outputs, logabsdet = layer(x)
    (outputs.square().sum() - logabsdet.sum()).backward()
    torch.testing.assert_close(x.grad, 2 * outputs.detach() * layer.log_scale.exp())
    assert layer.log_scale.grad.isfinite().all() and layer.shift.grad.isfinite().all()


def test_float32_statistics_do_not_drown_in_a_large_mean():
    x = torch.randn(4000, 1) + 3000
    outputs, _ = ActNorm(1)(x)
    assert outputs.mean().abs() < 2e-3 and (outputs.std() - 1).abs() < 2e-3


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^features must be at least 1, got 0\.$"):
        ActNorm(0)
