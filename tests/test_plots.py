"""Pictures that the notebooks share."""

import math
from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure

from datasets.densities import DENSITIES
from flows import Flow, Rotation, givens, plots
from flows.distributions import Normal
from flows.transforms import ActNorm


@pytest.fixture
def axis():
    return Figure().subplots()


@pytest.mark.parametrize("make", [givens.crossing, givens.cosine_sine, givens.round_robin])
def test_a_round_diagram_has_a_bar_for_every_plane(axis, make):
    schedule = make(7)
    plots.rounds(axis, schedule)
    bars = [line for line in axis.lines if len(set(line.get_xdata())) == 1]
    drawn = sorted(tuple(map(int, bar.get_ydata())) for bar in bars)
    assert drawn == sorted(map(tuple, schedule.planes.tolist()))
    assert axis.get_title() == f"{schedule}: 21 planes in {len(schedule)} rounds"


def test_bars_of_a_round_diagram_never_cover_each_other(axis):
    plots.rounds(axis, givens.round_robin(9))
    spans = {}
    for line in axis.lines:
        spans.setdefault(line.get_xdata()[0], []).append(sorted(line.get_ydata()))
    for bars in spans.values():
        assert all(low[1] < high[0] for low, high in pairwise(sorted(bars)))


def test_planes_are_cells_shaded_by_their_first_round(axis):
    schedule = givens.cosine_sine(4)  # planes (0, 1) and (2, 3) turn in the rounds 0 and 2
    plots.planes(axis, schedule)
    shown = torch.from_numpy(axis.images[1].get_array().filled(math.nan))
    cells = {(i, j): shown[i, j].item() for i, j in (~shown.isnan()).nonzero().tolist()}
    assert cells == {(0, 1): 0, (2, 3): 0, (0, 2): 1, (1, 3): 1}
    twice = {tuple(text.get_position()) for text in axis.texts if text.get_text() == "2"}
    assert twice == {(1, 0), (3, 2)}  # column, row


def test_densities_stand_on_the_scale_of_the_first():
    truth = DENSITIES["two_moons"]
    flow = Flow(Rotation(2), Normal(2))
    laws = {"true": truth.log_prob, "learned": flow.log_prob}
    figure = plots.densities(laws, truth.extent, pixels=50)
    true, learned = (axis.images[0] for axis in figure.axes)
    assert [axis.get_title() for axis in figure.axes] == ["true", "learned"]
    assert learned.get_clim() == true.get_clim() == (0, true.get_array().max())
    # The middle of the picture, not of the plane, for a picture that is flipped to be noticed.
    left, right, bottom, top = truth.extent
    point = torch.tensor([[left + 10 / 49 * (right - left), bottom + 30 / 49 * (top - bottom)]])
    assert true.get_array()[30, 10] == pytest.approx(truth.log_prob(point).exp().item(), rel=1e-4)


def test_cells_keep_their_areas_where_volume_is_kept(axis):
    extent = (-1.0, 3.0, 0.0, 2.0)
    scale = ActNorm(2)
    scale(torch.randn(100, 2) * torch.tensor([0.5, 2.0]))
    for transform in (Rotation(2, init="haar"), scale):
        for inverse in (False, True):
            plots.cells(axis, transform, extent, "cells", inverse=inverse, across=4)
    areas = torch.tensor(
        [[_area(path.vertices) for path in c.get_paths()] for c in axis.collections]
    )
    factor = scale(torch.zeros(1, 2))[1].exp().item()
    expected = 4 * 2 / 16 * torch.tensor([1, 1, factor, 1 / factor])
    torch.testing.assert_close(areas, expected[:, None].expand(4, 16), rtol=1e-4, atol=0)


def _area(corners) -> float:
    x, y = torch.as_tensor(corners).T
    return 0.5 * (x * y.roll(-1) - y * x.roll(-1)).sum().abs().item()


def test_image_rows_have_their_labels_and_their_white():
    rows = {"a": torch.full((2, 1, 3, 3), 16 / 17), "b": torch.zeros(5, 1, 3, 3)}
    figure = plots.image_rows(rows, grey_levels=17)
    assert [axis.texts[0].get_text() for axis in figure.axes] == ["a", "b"]
    first, second = (axis.images[0].get_array() for axis in figure.axes)
    assert first.shape == second.shape == (3, 5 * 4 - 1)
    assert first.min() == pytest.approx(1) and second[:, :3].max() == 0


def test_losses_that_a_run_does_not_have_are_not_in_its_legend():
    figure = plots.history([{"epoch": 0, "val/nll": 2.0}, {"epoch": 1, "val/nll": 1.0}])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["val"]
    assert plots.history([{"epoch": 0, "train/selbo": 2.0}]).axes[0].get_legend() is None


def test_samples_with_gradients_are_drawn():
    plots.samples(torch.randn(5, 2, requires_grad=True))
    plots.samples(torch.rand(5, 1, 3, 3, requires_grad=True))
    plots.marginals(torch.randn(5, 3, requires_grad=True), torch.randn(9, 3))


def test_images_of_two_channels_are_refused():
    with pytest.raises(ValueError, match="images must have 1 or 3 channels to be drawn, got 2"):
        plots.samples(torch.rand(5, 2, 3, 3))
