import math

import numpy as np
import pytest
import torch

from flows import givens
from flows.givens import Schedule
from flows.givens.recover import recover

# Each with the sizes for which recovery is exact.
EXACT = {
    "cosine_sine": [*range(2, 34), 64, 129],
    "crossing": [*range(2, 34), 64, 129],
    "hurwitz": [*range(2, 34), 64, 129],
    "odd_even": [*range(2, 34), 64, 129],
    "round_robin": [*range(3, 34, 2), 129],
}
every_kind = pytest.mark.parametrize("kind", EXACT)
every_size = pytest.mark.parametrize(
    ("kind", "dim"), [(kind, dim) for kind, dims in EXACT.items() for dim in dims]
)


def haar(dim):
    q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    return positive(q * r.diagonal().sign())


def positive(q):
    """With determinant +1."""
    q = q.clone()
    q[0] *= torch.linalg.det(q).sign()
    return q


def near_identity(dim, size):
    a = size * torch.randn(dim, dim, dtype=torch.float64)
    return torch.linalg.matrix_exp(a - a.mT)


def half_turns(dim):
    signs = -torch.ones(dim, dtype=torch.float64)
    signs[0] = (-1.0) ** (dim - 1)
    return signs.diag()


def one_plane(dim):
    q = torch.eye(dim, dtype=torch.float64)
    q[[0, 0, -1, -1], [0, -1, 0, -1]] = q.new_tensor([0.6, -0.8, 0.8, 0.6])
    return q


SPECIAL = {
    "identity": lambda dim: torch.eye(dim, dtype=torch.float64),
    "half turns": half_turns,
    "reversal": lambda dim: positive(torch.eye(dim, dtype=torch.float64).flip(0)),
    "signed permutation": lambda dim: positive(
        torch.eye(dim, dtype=torch.float64)[torch.randperm(dim)]
        * torch.randn(dim, 1, dtype=torch.float64).sign()
    ),
    "one plane": one_plane,
    "block diagonal": lambda dim: torch.block_diag(haar(dim // 2), haar((dim + 1) // 2)),
    "near the identity": lambda dim: near_identity(dim, 1e-3),
    "nearer the identity": lambda dim: near_identity(dim, 1e-9),
    "an ulp from the identity": lambda dim: near_identity(dim, 1e-16),
}


def rebuilding_error(q, schedule, **options):
    angles = recover(q, schedule, **options)
    assert angles.shape == (*q.shape[:-2], schedule.num_angles) and angles.dtype == q.dtype
    assert angles.abs().max() <= math.pi + 1e-6
    impl = "reference" if schedule.dim <= 33 else "rounds"
    rebuilt = givens.matrix(angles.double(), schedule, impl=impl)
    return (rebuilt - q.double()).abs().max().item()


# --- exact methods --------------------------------------------------------------------------


@every_kind
def test_quarter_turn_is_found_with_its_sign(kind):
    schedule = getattr(givens, kind)(3)
    matrix = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert rebuilding_error(matrix, schedule) < 1e-7
    plane = (schedule.planes == torch.tensor([0, 1])).all(1)
    if kind != "cosine_sine":  # which has two planes for one turn
        expected = torch.where(plane, math.pi / 2, 0.0)
        torch.testing.assert_close(recover(matrix, schedule), expected)


@every_size
def test_random_rotation_is_rebuilt(kind, dim):
    schedule = getattr(givens, kind)(dim)
    assert rebuilding_error(haar(dim), schedule) <= 1e-14 * dim


@every_kind
@pytest.mark.parametrize("target", SPECIAL)
def test_special_rotation_is_rebuilt(kind, target):
    for dim in {2, 3, 4, 5, 8, 9, 16, 31} & set(EXACT[kind]):
        schedule = getattr(givens, kind)(dim)
        assert rebuilding_error(SPECIAL[target](dim), schedule) <= 1e-14 * dim, dim


@every_kind
@pytest.mark.parametrize("dim", [3, 9, 33])
def test_float32_rotation_is_rebuilt_to_float32(kind, dim):
    schedule = getattr(givens, kind)(dim)
    # Angles up to pi, rounded by up to 1.2e-7 each.
    assert rebuilding_error(haar(dim).float(), schedule) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "dim"), [(kind, 9) for kind in EXACT if kind != "cosine_sine"] + [("round_robin", 8)]
)
def test_small_angles_come_back_themselves(kind, dim):
    # At most one set of small angles leads to a matrix, as the map is isometric there.
    schedule = getattr(givens, kind)(dim)
    angles = 0.02 * torch.randn(schedule.num_angles, dtype=torch.float64)
    torch.testing.assert_close(
        recover(givens.matrix(angles, schedule), schedule), angles, atol=1e-12, rtol=0
    )


@every_kind
def test_matrix_slightly_off_gets_the_angles_of_the_nearest_rotation(kind):
    schedule, q = getattr(givens, kind)(7), haar(7)
    stretched = q @ (torch.eye(7) + 1e-5).double()  # Q is its polar factor
    angles = recover(stretched, schedule)
    torch.testing.assert_close(givens.matrix(angles, schedule), q, atol=1e-13, rtol=0)


@every_kind
def test_batch_axes_are_kept(kind):
    schedule = getattr(givens, kind)(5)
    q = torch.stack([haar(5) for _ in range(6)]).view(2, 3, 5, 5)
    angles = recover(q, schedule)
    assert angles.shape == (2, 3, 10)
    for k in [(0, 0), (0, 2), (1, 1)]:
        assert torch.equal(angles[k], recover(q[k], schedule))
    assert recover(q[:, :0], schedule).shape == (2, 0, 10)


@pytest.mark.parametrize(("kind", "dim"), [*((kind, 5) for kind in EXACT), ("round_robin", 4)])
def test_matrix_is_left_as_it_was(kind, dim):
    schedule, q = getattr(givens, kind)(dim), haar(dim)
    angles = recover(q.clone().requires_grad_(), schedule)
    assert not angles.requires_grad
    transposed = q.mT.clone()
    assert torch.equal(recover(transposed.mT, schedule), angles)  # another layout in memory
    assert torch.equal(transposed.mT, q)


# --- least squares --------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 4, 6, 8, 10])
def test_circle_of_even_size_is_fitted(dim):
    schedule = givens.round_robin(dim)
    for q in (haar(dim), haar(dim), *(make(dim) for make in SPECIAL.values())):
        assert rebuilding_error(q, schedule) <= 1e-13 * dim


def test_restarts_are_their_own_and_leave_the_global_generators_alone():
    schedule, q = givens.round_robin(6), half_turns(6)  # zero angles are a saddle point
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = recover(q, schedule), recover(q, schedule)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    other = recover(q, schedule, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_failed_fit_says_how_often_and_how_far():
    schedule, q = givens.round_robin(4), half_turns(4)
    with pytest.raises(RuntimeError, match=r"round_robin\(4\).* 1 starts .* residual of 4 "):
        recover(q, schedule, starts=1)
    assert rebuilding_error(q, schedule, starts=32) <= 1e-13


# --- refusals -------------------------------------------------------------------------------

BAD_SCHEDULES = {
    "butterfly": givens.butterfly(8),
    "frame": givens.crossing(8).frame(3),
    "between": givens.crossing(8).between([0, 1], [2]),
    "blocks": givens.odd_even(8).blocks(2),
    "banded": givens.hurwitz(8).banded(7),
    "first rounds": givens.cosine_sine(8).first_rounds(7),
    "hand-made": Schedule(8, givens.crossing(8).rounds),
}


@pytest.mark.parametrize("schedule", BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_schedule_without_a_method_is_refused(schedule):
    with pytest.raises(ValueError, match="crossing, hurwitz, odd_even") as refusal:
        recover(torch.eye(8), schedule)
    assert str(refusal.value).endswith(f"got {schedule}.")


def spoiled(value):
    q = haar(4)
    q[1, 2] = value
    return q


BAD_MATRICES = {
    "too small": (lambda: haar(3), r"4 rows and 4 columns, .* got \(3, 3\)"),
    "not square": (lambda: haar(4)[:, :3], r"4 rows and 4 columns, .* got \(4, 3\)"),
    "a vector": (lambda: torch.ones(4), r"4 rows and 4 columns, .* got \(4,\)"),
    "a number": (lambda: torch.tensor(1.0), r"4 rows and 4 columns, .* got \(\)"),
    "integer": (lambda: torch.eye(4).long(), "floating-point numbers, got torch.int64"),
    "complex": (lambda: torch.eye(4) + 0j, "floating-point numbers, got torch.complex64"),
    "nan": (lambda: spoiled(math.nan), "finite, got NaN or infinite"),
    "infinite": (lambda: spoiled(math.inf), "finite, got NaN or infinite"),
    "not orthogonal": (lambda: 1.1 * haar(4), "orthogonal, .* error of 0.21"),
    "singular": (lambda: torch.zeros(4, 4), "orthogonal, .* error of 1"),
    "reflection": (lambda: -half_turns(4)[[1, 0, 2, 3]], r"determinant \+1.* got -1.*init="),
    "one in a batch": (lambda: torch.stack([haar(4), 2 * haar(4)]), "orthogonal"),
    "one mirrored": (lambda: torch.stack([haar(4), haar(4).flip(0)[:, [1, 0, 2, 3]]]), "got -1"),
}


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(("make", "message"), BAD_MATRICES.values(), ids=BAD_MATRICES)
def test_bad_matrix_is_refused(make, message):
    for schedule in (givens.crossing(4), givens.round_robin(4)):
        with pytest.raises(ValueError, match=f"^matrix must .*{message}"):
            recover(make(), schedule)


def test_no_starts_are_refused():
    with pytest.raises(ValueError, match="starts must be at least 1, got 0"):
        recover(torch.eye(4), givens.round_robin(4), starts=0)
