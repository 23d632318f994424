import pytest
import torch
from torch import nn

from flows.nets import MADE, MLP, ConvNet, Hats, OneHot


def randomized(net: nn.Module) -> nn.Module:
    """Outputs start at zero, which would hide mistakes."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net


NETS = {
    "mlp": (lambda: MLP(3, 5, hidden_features=8), (4, 3), (4, 5)),
    "mlp, no blocks": (lambda: MLP(3, 5, hidden_features=8, blocks=0), (4, 3), (4, 5)),
    "mlp, knots": (lambda: MLP(3, 5, hidden_features=8, knots=4), (4, 3), (4, 5)),
    "mlp, relu": (lambda: MLP(3, 5, hidden_features=8, activation="relu"), (4, 3), (4, 5)),
    "mlp, one feature": (lambda: MLP(1, 1, hidden_features=1), (4, 1), (4, 1)),
    "made": (lambda: MADE(3, 5, hidden_features=8), (4, 3), (4, 3, 5)),
    "made, no blocks": (lambda: MADE(2, 1, hidden_features=2, blocks=0), (4, 2), (4, 2, 1)),
    "convnet": (lambda: ConvNet(3, 5, hidden_features=8), (4, 3, 6, 2), (4, 5, 6, 2)),
    "convnet, other kernels": (
        lambda: ConvNet(3, 5, hidden_features=8, kernel_sizes=(5, 3, 1)),
        (4, 3, 6, 2),
        (4, 5, 6, 2),
    ),
    "convnet, one pixel": (lambda: ConvNet(3, 5, hidden_features=8), (4, 3, 1, 1), (4, 5, 1, 1)),
}
each_net = pytest.mark.parametrize(("make", "shape", "expected"), NETS.values(), ids=NETS)


@each_net
def test_outputs_have_the_promised_shape_and_start_at_zero(make, shape, expected):
    assert torch.equal(make()(torch.randn(shape)), torch.zeros(expected))


@each_net
def test_every_parameter_and_input_matters(make, shape, expected):
    net, inputs = randomized(make()), torch.randn(shape, requires_grad=True)
    net(inputs).square().sum().backward()
    for tensor in (inputs, *net.parameters()):
        assert (tensor.grad != 0).any() and tensor.grad.isfinite().all()


@each_net
def test_rows_do_not_see_one_another(make, shape, expected):
    net, inputs = randomized(make()).double(), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(net(inputs)[1:2], net(inputs[1:2]))


@each_net
def test_no_rows_give_no_rows(make, shape, expected):
    assert make()(torch.empty(0, *shape[1:])).shape == (0, *expected[1:])


@pytest.mark.parametrize("net", [MLP, ConvNet])
def test_options_shape_the_layers(net):
    made = net(2, 4, hidden_features=7)
    sizes = [p.shape[:2] for p in made.parameters() if p.ndim > 1]
    assert sizes[0] == (7, 2) and sizes[-1] == (4, 7)
    assert {tuple(size) for size in sizes[1:-1]} == {(7, 7)}
    assert len(list(MLP(2, 4, blocks=5).blocks)) == 5


@pytest.mark.parametrize(
    ("net", "shape"), [(MLP, (64, 2)), (MADE, (64, 2)), (ConvNet, (64, 2, 2, 2))]
)
def test_dropout_acts_in_training_only(net, shape):
    made, inputs = randomized(net(2, 3, hidden_features=8, dropout=0.5)), torch.randn(shape)
    assert not torch.equal(made(inputs), made(inputs))
    made.eval()
    assert torch.equal(made(inputs), made(inputs))


def test_mlp_reads_every_feature_of_the_context():
    net = randomized(MLP(2, 3, hidden_features=8, context_features=2))
    context = torch.randn(4, 2, requires_grad=True)
    net(torch.randn(4, 2), context).square().sum().backward()
    assert (context.grad != 0).all()


@pytest.mark.parametrize("net", [MLP, MADE, ConvNet])
@pytest.mark.parametrize("context", [None, torch.zeros(4, 1), torch.zeros(4, 3), torch.zeros(2)])
def test_context_of_another_size_is_refused(net, context):
    inputs = torch.zeros(4, 2, 2, 2) if net is ConvNet else torch.zeros(4, 2)
    with pytest.raises(ValueError, match="^context must have 2 features, got "):
        net(2, 3, context_features=2)(inputs, context)


def test_hats_interpolate_what_is_known_at_the_knots():
    hats = Hats(2, knots=5, bound=2.0).double()
    knots = torch.arange(-2.0, 3.0, dtype=torch.float64)
    assert torch.equal(hats(knots[:, None].expand(5, 2))[:, 5:], torch.eye(5, dtype=torch.float64))
    inputs = 3 * torch.randn(200, 2, dtype=torch.float64)
    outputs = hats(inputs).unflatten(1, (2, 5))
    assert (outputs >= 0).all() and ((outputs > 0).sum(-1) <= 2).all()
    torch.testing.assert_close(outputs.sum(-1), torch.ones(200, 2, dtype=torch.float64))
    torch.testing.assert_close(outputs @ knots, inputs.clamp(-2, 2))  # nothing is known outside


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": -1}, "features must be at least 0, got -1"),
        ({"features": 1, "knots": 1}, "knots must be at least 2, got 1"),
        ({"features": 1, "bound": 0.0}, "bound must be finite and greater than 0, got 0"),
    ],
    ids=str,
)
def test_hats_refuse_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        Hats(**options)


def test_mlp_refuses_other_activations_and_knots():
    with pytest.raises(ValueError, match="activation must be 'silu' or 'relu', got 'tanh'"):
        MLP(1, 1, activation="tanh")
    with pytest.raises(ValueError, match="knots must be at least 0, got -1"):
        MLP(1, 1, knots=-1)


def test_convnet_adds_the_context_to_every_position():
    net = ConvNet(2, 3, context_features=2)
    nn.init.normal_(net.layers[-1].weight)
    inputs, context = torch.randn(1, 2, 1, 1).expand(4, 2, 5, 5), torch.randn(4, 2)
    outputs = net(inputs, context)[:, :, 2, 2]  # away from the zero padding
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(net(inputs[:1], context[:1])[:, :, 2, 2], outputs[:1])


def test_a_function_of_the_context_alone():
    net = MLP(0, 3, context_features=2)
    assert net(torch.zeros(4, 0), torch.zeros(4, 2)).shape == (4, 3)
    with pytest.raises(ValueError, match="needs context_features, got 0"):
        MLP(0, 3)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (MLP, {"hidden_features": 0}),
        (MLP, {"hidden_features": -1}),
        (MLP, {"blocks": -1}),
        (MLP, {"context_features": -1}),
        (MADE, {"hidden_features": 1}),
        (MADE, {"blocks": -1}),
        (MADE, {"context_features": -1}),
        (ConvNet, {"hidden_features": 0}),
        (ConvNet, {"hidden_features": -1}),
        (ConvNet, {"kernel_sizes": (3, 2, 1)}),
        (ConvNet, {"kernel_sizes": (3, 3)}),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(net, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must .*, got "):
        net(2, 3, **options)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_one_hot_has_a_row_per_label(kind):
    labels = torch.tensor([2, 0, 3, 0], dtype=kind)
    expected = torch.eye(4)[[2, 0, 3, 0]]
    assert torch.equal(OneHot(4)(labels), expected)
    assert OneHot(4)(labels[:0]).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_hot_follows_the_dtype_of_the_module(dtype):
    net = OneHot(2).to(dtype)
    assert net(torch.tensor([1])).dtype == dtype and not net.state_dict()
    assert OneHot(2)(torch.tensor([1])).dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), "labels must be 0 to 2, got 0 to 3"),
        (torch.tensor([-1, 2]), "labels must be 0 to 2, got -1 to 2"),
        (torch.tensor([0.0, 1.0]), r"integers of shape \(batch,\), got torch.float32 \(2,\)"),
        (torch.tensor([True]), r"integers of shape \(batch,\), got torch.bool \(1,\)"),
        (torch.tensor([[0, 1]]), r"integers of shape \(batch,\), got torch.int64 \(1, 2\)"),
        (torch.tensor(1), r"integers of shape \(batch,\), got torch.int64 \(\)"),
    ],
    ids=str,
)
def test_one_hot_refuses_other_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        OneHot(3)(labels)


def test_one_hot_needs_a_class():
    with pytest.raises(ValueError, match="^classes must be at least 1, got 0"):
        OneHot(0)
