import copy
import math

import jaxtyping
import pytest
import torch
from torch import nn

from flows import givens
from flows.transforms import Rotation, Rotation1x1

SCHEDULES = {
    "default": lambda n: None,
    "round_robin": givens.round_robin,
    "cosine_sine": givens.cosine_sine,
    "restricted cosine_sine": lambda n: givens.cosine_sine(n).first_rounds(1),
    "butterfly": givens.butterfly,
    "frame": lambda n: givens.crossing(n).frame(2),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@pytest.fixture
def no_type_hook(monkeypatch):
    """Turn off the test run's own type checks, so that bad arguments reach our door."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def learned(*args, **kwargs):
    """A layer whose parameters are somewhere else than where they start."""
    layer = Rotation(*args, **kwargs)
    nn.init.normal_(layer.raw_angles)
    return layer


def defect(matrix):
    matrix = matrix.double()
    return (matrix @ matrix.mT - torch.eye(len(matrix))).abs().max().item()


def haar(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


# --- where it starts ------------------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("n", [2, 5, 8])
def test_starts_at_the_matrix_it_is_asked_for(n, schedule):
    start = haar(n).float()
    layers = {init: Rotation(n, schedule(n), init=init) for init in ("identity", "permutation")}
    torch.testing.assert_close(layers["identity"].matrix(), torch.eye(n), rtol=0, atol=1e-6)
    permutation = layers["permutation"].matrix()
    torch.testing.assert_close(permutation, permutation.round(), rtol=0, atol=1e-6)
    assert sorted(permutation.abs().argmax(1).tolist()) == list(range(n))
    given = Rotation(n, schedule(n), init=start)
    torch.testing.assert_close(given.matrix(), start, rtol=0, atol=1e-6)
    assert defect(Rotation(n, schedule(n), init="haar").matrix()) < 1e-6


def test_random_starts_are_spread_evenly():
    entries = torch.stack([Rotation(3, init="haar").base for _ in range(1000)])
    # Uniform on O(3): each entry is uniform on (-1, 1), both determinants are equally likely.
    # 4.5 standard deviations of the mean, of the mean square, and of the mean sign.
    assert entries.mean(0).abs().max() < 4.5 * math.sqrt(1 / 3 / 1000)
    assert (entries.square().mean(0) - 1 / 3).abs().max() < 4.5 * math.sqrt(4 / 45 / 1000)
    assert torch.linalg.det(entries).round().mean().abs() < 4.5 * math.sqrt(1 / 1000)
    seats = torch.stack([Rotation(3, init="permutation").base for _ in range(1000)]).mean(0)
    assert (seats - 1 / 3).abs().max() < 4.5 * math.sqrt(2 / 9 / 1000)


def test_angles_start_at_zero_unless_the_schedule_is_degenerate_there():
    assert (Rotation(6).angles == 0).all()
    assert (Rotation(6, givens.cosine_sine(6)).angles.abs() > 1e-6).all()


@pytest.mark.parametrize("limit", [0.1, 1.0, 20.0])
def test_limited_cosine_sine_angles_start_where_they_can_move(limit):
    layer = Rotation(8, givens.cosine_sine(8), angle_limit=limit)
    (slope,) = torch.autograd.grad(layer.angles.sum(), layer.raw_angles)
    # The slope of tanh within (-1, 1).
    assert slope.min() > 0.4


def test_given_matrix_is_copied_and_may_be_a_reflection():
    start = torch.eye(3)
    start[0, 0] = -1
    layer = Rotation(3, init=start)
    start.zero_()
    assert layer.matrix().tolist() == [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]


BAD = {
    "one feature": (lambda: Rotation(1), "features must be at least 2, got 1"),
    "other dimension": (
        lambda: Rotation(4, givens.crossing(5)),
        r"schedule must have dimension 4, got crossing\(5\)",
    ),
    "matrix of other shape": (
        lambda: Rotation(4, init=torch.eye(3)),
        r"init must have shape \(4, 4\), got \(3, 3\)",
    ),
    "stretched matrix": (
        lambda: Rotation(2, init=1.1 * torch.eye(2)),
        "init must be orthogonal, Q Q.T = I; its largest error is 0.21",
    ),
    "sheared matrix": (
        lambda: Rotation(2, init=torch.tensor([[1.0, 0.01], [0.0, 1.0]])),
        "init must be orthogonal",
    ),
    "matrix of nan": (
        lambda: Rotation(2, init=torch.full((2, 2), math.nan)),
        "init must be orthogonal.* nan",
    ),
    "unknown init": (lambda: Rotation(4, init="random"), "init must be .* got 'random'"),
    "limit of zero": (
        lambda: Rotation(4, angle_limit=0.0),
        "angle_limit must be finite and greater than 0, got 0.0",
    ),
    "limit of nan": (lambda: Rotation(4, angle_limit=math.nan), "got nan"),
    "unknown ties": (lambda: Rotation(4, ties="round"), "ties must be 'rounds' or .* got 'round'"),
    "too few ties": (
        lambda: Rotation(4, ties=[0, 1, 0]),
        r"each of the 6 angles of crossing\(4\), got \(3,\)",
    ),
    "fractional ties": (lambda: Rotation(3, ties=[0.0, 1.0, 0.0]), r"got \(3,\) of torch.float32"),
    "ties with a gap": (
        lambda: Rotation(3, ties=[0, 2, 0]),
        r"0, 1, ... without gaps, got \[0, 2\]",
    ),
    "negative ties": (lambda: Rotation(3, ties=[-1, 0, 1]), r"without gaps, got \[-1, 0, 1\]"),
}


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_plain_words(case):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make()


# --- what it computes -----------------------------------------------------------------------


@each_schedule
def test_forward_multiplies_by_w_and_inverse_by_its_transpose(schedule):
    layer = learned(5, schedule(5), init="haar").double()
    inputs = torch.randn(7, 5, dtype=torch.float64)
    outputs, _ = layer(inputs)
    turned = givens.rotate(inputs, layer.angles, layer.schedule)
    torch.testing.assert_close(outputs, turned @ layer.base.mT)
    torch.testing.assert_close(outputs, inputs @ layer.matrix().mT)
    torch.testing.assert_close(layer.inverse(outputs)[0], inputs)


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("shape", [(7, 5), (0, 5), (3, 2, 5)], ids=str)
def test_logabsdet_is_zero_and_can_be_written_to(shape, way):
    outputs, logabsdet = getattr(learned(5), way)(torch.randn(shape))
    assert outputs.shape == shape
    assert logabsdet.shape == shape[:1] and (logabsdet == 0).all()
    logabsdet += torch.arange(len(logabsdet))
    assert logabsdet.tolist() == list(range(len(logabsdet)))


@pytest.mark.parametrize("way", ["forward", "inverse"])
@pytest.mark.parametrize("shape", [(3, 4), (5, 3), (5,)], ids=str)
def test_wrong_number_of_features_is_refused(shape, way):
    with pytest.raises(ValueError, match=r"inputs must have 5 features on axis -1, got \("):
        getattr(Rotation(5), way)(torch.randn(shape))


def test_one_by_one_convolution_turns_every_pixel_alike():
    layer = Rotation1x1(5, init="haar")
    nn.init.normal_(layer.rotation.raw_angles)
    inputs = torch.randn(2, 5, 3, 4)
    outputs, logabsdet = layer(inputs)
    pixels = layer.rotation(inputs.movedim(1, -1))[0].movedim(-1, 1)
    torch.testing.assert_close(outputs, pixels)
    torch.testing.assert_close(layer.inverse(outputs)[0], inputs)
    assert torch.equal(logabsdet, torch.zeros(2))
    before = layer.matrix().detach()
    layer.recenter()
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="5 features"):
        layer(torch.randn(2, 3, 5, 4))


# --- limits and ties ------------------------------------------------------------------------


def test_angle_limit_bounds_the_angles_and_leaves_small_ones_alone():
    layer = Rotation(4, angle_limit=0.5).double()
    with torch.no_grad():
        layer.raw_angles.copy_(torch.tensor([-1e6, -2.0, -1e-4, 1e-4, 2.0, 1e6]))
    assert (layer.angles.abs() <= 0.5).all()
    assert (layer.angles.abs()[[1, 4]] < 0.5).all()
    torch.testing.assert_close(layer.angles[2:4], layer.raw_angles[2:4], rtol=1e-7, atol=0)
    assert (layer.angles.diff() > 0).all(), "the map keeps the order"
    nn.init.zeros_(layer.raw_angles)
    (slope,) = torch.autograd.grad(layer.angles.sum(), layer.raw_angles)
    assert (slope == 1).all()


def test_tied_rounds_share_one_angle_each():
    schedule = givens.crossing(6)
    layer = learned(6, ties="rounds")
    assert layer.raw_angles.shape == (len(schedule),)
    for angles, parameter in zip(
        layer.angles.split(schedule.round_sizes), layer.raw_angles, strict=True
    ):
        assert (angles == parameter).all()


def test_ties_by_list_share_as_listed_and_sum_the_gradient():
    layer = learned(3, ties=[1, 0, 1])
    a, b = layer.raw_angles.tolist()
    assert layer.angles.tolist() == [b, a, b]
    free = Rotation(3)
    free.raw_angles.data = layer.angles.detach()
    weight = torch.randn(3, 3)
    for each in (layer, free):
        (each.matrix() * weight).sum().backward()
    x, y, z = free.raw_angles.grad
    torch.testing.assert_close(layer.raw_angles.grad, torch.stack([y, x + z]))


# --- recentering and training ---------------------------------------------------------------


@each_schedule
@pytest.mark.parametrize("options", [{}, {"ties": "rounds"}, {"angle_limit": 0.7}], ids=str)
def test_recenter_keeps_w_and_restarts_the_angles(schedule, options):
    layer = learned(8, schedule(8), init="haar", **options)
    before, parameter = layer.matrix().detach(), layer.raw_angles
    layer.recenter()
    torch.testing.assert_close(layer.matrix(), before, rtol=0, atol=1e-6)
    assert layer.raw_angles is parameter, "the optimizer must not lose it"
    if not layer.schedule.name.startswith("cosine_sine"):
        assert (layer.raw_angles == 0).all()


def test_thousand_steps_with_recentering_keep_w_orthogonal():
    layer = Rotation(6, init="haar")
    target = haar(6).float()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(1000):
        optimizer.zero_grad()
        (layer.matrix() - target).square().sum().backward()
        optimizer.step()
        if step % 10 == 9:
            layer.recenter()
    assert defect(layer.base) < 1e-5
    assert defect(layer.matrix()) < 1e-5


def test_gradient_reaches_every_angle_and_not_the_base():
    layer = learned(6)
    inputs = torch.randn(3, 6, requires_grad=True)
    layer(inputs)[0].pow(3).sum().backward()
    assert (layer.raw_angles.grad != 0).all() and inputs.grad is not None
    assert not layer.base.requires_grad
    assert [name for name, _ in layer.named_parameters()] == ["raw_angles"]


# --- saving, loading, copying ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ties": "rounds"}, {"angle_limit": 0.7}], ids=str)
def test_state_dict_carries_everything(tmp_path, options):
    layer = learned(5, givens.crossing(5).frame(3), init="haar", **options)
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    twin = Rotation(5, givens.crossing(5).frame(3), **options)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin.matrix(), layer.matrix())
    assert set(layer.state_dict()) == {"raw_angles", "base", "_extra_state"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (givens.crossing(4), givens.odd_even(4)),  # as many angles
        (givens.cosine_sine(4), givens.crossing(4)),
        (givens.butterfly(4), givens.crossing(4)),  # fewer angles
        (givens.crossing(4).frame(3), givens.crossing(4)),  # the very same planes
        (givens.Schedule(4, givens.crossing(4).rounds), givens.crossing(4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
def test_weights_of_another_schedule_are_refused_by_name(theirs, ours, strict):
    state = Rotation(4, theirs).state_dict()
    with pytest.raises(ValueError) as refusal:
        Rotation(4, ours).load_state_dict(state, strict=strict)
    assert theirs.name in str(refusal.value) and ours.name in str(refusal.value)


def test_deepcopy_is_independent():
    layer = learned(5, ties="rounds", init="haar")
    twin = copy.deepcopy(layer)
    before = layer.matrix().detach()
    assert torch.equal(twin.matrix(), before)
    assert twin.schedule == layer.schedule
    nn.init.normal_(twin.raw_angles)
    assert torch.equal(layer.matrix(), before) and not torch.equal(twin.matrix(), before)


def test_keeps_the_dtype_it_is_moved_to():
    layer = learned(5, init="haar", ties="rounds", angle_limit=0.5).double()
    outputs, logabsdet = layer(torch.randn(2, 5, dtype=torch.float64))
    assert outputs.dtype == logabsdet.dtype == layer.matrix().dtype == torch.float64
    assert defect(layer.matrix()) < 1e-14
    layer.recenter()
    assert layer.base.dtype == torch.float64
    assert defect(layer.base) < 1e-14


def test_repr_names_size_and_schedule():
    expected = "Rotation(features=4, schedule=crossing(4).frame(2), angles=5)"
    assert repr(Rotation(4, givens.crossing(4).frame(2))) == expected


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (dict(angle_limit=0.5), dict(angle_limit=1.0)),
        (dict(angle_limit=0.5), dict()),
        (dict(ties=[0, 0, 1, 1, 2, 2]), dict(ties=[0, 1, 2, 0, 1, 2])),
    ],
    ids=str,
)
def test_weights_of_other_limits_or_ties_are_refused(saved, loading):
    with pytest.raises(ValueError, match="these weights belong to"):
        Rotation(4, **loading).load_state_dict(Rotation(4, **saved).state_dict())


def test_the_matrix_stays_in_full_precision_under_autocast():
    layer = Rotation(8, init="haar")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = layer.matrix()
    assert w.dtype == torch.float32
    torch.testing.assert_close(w, layer.matrix())


def test_an_infinite_limit_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Rotation(4, angle_limit=math.inf)


def test_refused_weights_change_nothing():
    layer, other = Rotation(4), Rotation(4, givens.odd_even(4))
    nn.init.normal_(other.raw_angles)
    with pytest.raises(ValueError, match="belong to the schedule odd_even"):
        layer.load_state_dict(other.state_dict())
    assert layer.raw_angles.abs().max() == 0


@pytest.mark.parametrize("make", [Rotation, Rotation1x1])
def test_autocast_keeps_the_dtype_of_the_inputs(make):
    layer, x = make(8, init="haar"), torch.randn(5, 8, 1, 1)
    x = x if make is Rotation1x1 else x.flatten(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
        back, _ = layer.inverse(y)
    assert y.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
