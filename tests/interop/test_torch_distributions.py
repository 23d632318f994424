"""Our transforms in torch.distributions."""

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution

from flows import Composite, Flow, Multiscale, Rotation, Rotation1x1, SplineCoupling, distributions
from flows.interop import to_torch
from flows.nets import MLP, OneHot

FEATURES = 3


def chain(context_features: int = 0) -> Composite:
    def net(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, hidden_features=8, blocks=1, context_features=context_features)

    transform = Composite([Rotation(FEATURES, init="haar"), SplineCoupling(FEATURES, net, bins=4)])
    for parameter in transform.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transform


def noise() -> Independent:
    return Independent(Normal(torch.zeros(FEATURES), torch.ones(FEATURES)), 1)


def test_it_makes_the_density_and_the_samples_of_our_flow():
    transform = chain()
    theirs = TransformedDistribution(noise(), to_torch(transform).inv)
    ours = Flow(transform, distributions.Normal(FEATURES))
    x = torch.randn(10, FEATURES)
    torch.testing.assert_close(theirs.log_prob(x), ours(x))
    torch.manual_seed(3)
    samples = theirs.sample((10,))
    torch.manual_seed(3)
    torch.testing.assert_close(samples, ours.sample(10))


def test_leading_axes_are_free():
    distribution = TransformedDistribution(noise(), to_torch(chain()).inv)
    x = distribution.rsample((2, 5))
    assert x.shape == (2, 5, FEATURES) and distribution.sample().shape == (FEATURES,)
    log_prob = distribution.log_prob(x)
    assert log_prob.shape == (2, 5) and distribution.log_prob(x[0, 0]).shape == ()
    torch.testing.assert_close(log_prob[1, 3], distribution.log_prob(x[1, 3]))


def test_parameters_are_trained_through_log_prob_and_samples():
    transform = chain()
    distribution = TransformedDistribution(noise(), to_torch(transform).inv)
    for value in (distribution.log_prob(torch.randn(5, FEATURES)), distribution.rsample((5,))):
        grads = torch.autograd.grad(value.sum(), list(transform.parameters()), allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads)


def test_a_context_broadcasts_from_the_right():
    transform = chain(2)
    x, context = torch.randn(4, 5, FEATURES), torch.randn(5, 2)
    y, ladj = to_torch(transform, context).call_and_ladj(x)
    for k in range(4):
        torch.testing.assert_close((y[k], ladj[k]), transform(x[k], context))
    one = to_torch(transform, context[0])
    rows = context[:1].expand(5, 2)
    torch.testing.assert_close(one.call_and_ladj(x[0]), transform(x[0], rows))
    torch.testing.assert_close(one.inv(one(x)), x, rtol=0, atol=1e-4)


def test_labels_are_rows_of_no_axes():
    class ByLabel(Rotation):
        def forward(self, inputs, context=None):
            assert OneHot(3)(context).shape == (len(inputs), 3)
            return super().forward(inputs)

    labels = torch.tensor([0, 2, 1, 0, 1])
    transform = to_torch(ByLabel(FEATURES), labels, context_dim=0)
    assert transform(torch.randn(4, 5, FEATURES)).shape == (4, 5, FEATURES)


def test_images_have_three_axes():
    transform = to_torch(Rotation1x1(4), event_dim=3)
    y, ladj = transform.call_and_ladj(torch.randn(2, 5, 4, 3, 3))
    assert y.shape == (2, 5, 4, 3, 3) and ladj.shape == (2, 5)


def test_the_inverse_of_the_inverse_is_the_transform():
    transform = to_torch(chain())
    assert transform.inv.inv == transform and transform.inv != transform
    assert transform != to_torch(chain())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"must have 1 axes per sample, got \(\)"):
        to_torch(chain())(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"context must broadcast to \(4, 2\).* got \(3, 2\)"):
        to_torch(chain(2), torch.zeros(3, 2))(torch.zeros(4, FEATURES))
    squeezing = Multiscale((1, 2, 2), [Rotation1x1(4)])
    with pytest.raises(ValueError, match=r"keep the shape of samples, got \(4,\) for \(1, 2, 2\)"):
        to_torch(squeezing, event_dim=3)(torch.zeros(4, 1, 2, 2))
    with pytest.raises(ValueError, match="event_dim must be at least 1, got 0"):
        to_torch(chain(), event_dim=0)
