import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from flows import givens
from flows.givens import Schedule

EACH_PLANE_ONCE = [givens.round_robin, givens.odd_even, givens.crossing, givens.hurwitz]
CONSTRUCTORS = [*EACH_PLANE_ONCE, givens.cosine_sine, givens.butterfly]
SIZES = range(2, 34)

each_constructor = pytest.mark.parametrize("make", CONSTRUCTORS, ids=lambda f: f.__name__)
each_once = pytest.mark.parametrize("make", EACH_PLANE_ONCE, ids=lambda f: f.__name__)


def log2(n):
    """ceil(log2 n), in integers."""
    return (n - 1).bit_length()


# --- constructors ---------------------------------------------------------------------------

BY_HAND = {
    "round_robin(4)": [{(0, 3), (1, 2)}, {(1, 3), (0, 2)}, {(2, 3), (0, 1)}],
    "round_robin(3)": [{(1, 2)}, {(0, 2)}, {(0, 1)}],
    "odd_even(5)": [
        {(0, 1), (2, 3)},
        {(0, 3), (2, 4)},
        {(1, 3), (0, 4)},
        {(1, 4), (0, 2)},
        {(3, 4), (1, 2)},
    ],
    "crossing(4)": [{(0, 1), (2, 3)}, {(1, 2)}, {(0, 2), (1, 3)}, {(0, 3)}],
    "crossing(3)": [{(1, 2)}, {(0, 1)}, {(0, 2)}],
    "cosine_sine(4)": [{(0, 1), (2, 3)}, {(0, 2), (1, 3)}, {(0, 1), (2, 3)}],
    "cosine_sine(3)": [{(0, 1)}, {(0, 2)}, {(0, 1)}],
    "hurwitz(4)": [{(2, 3)}, {(1, 3)}, {(0, 3), (1, 2)}, {(0, 2)}, {(0, 1)}],
    "butterfly(4)": [{(0, 1), (2, 3)}, {(0, 2), (1, 3)}],
    "butterfly(3)": [{(0, 1)}, {(0, 2)}],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_small_schedules_are_those_worked_out_by_hand(name):
    make, n = name.rstrip(")").split("(")
    schedule = getattr(givens, make)(int(n))
    assert [set(planes) for planes in schedule.rounds] == BY_HAND[name]
    assert schedule.name == repr(schedule) == name


def test_odd_even_of_four_lists_its_planes_in_the_order_of_the_style_guide():
    schedule = givens.odd_even(4)
    assert schedule.planes.tolist() == [[0, 1], [2, 3], [0, 3], [1, 3], [0, 2], [1, 2]]
    assert len(schedule) == 4


@each_constructor
def test_planes_are_ordered_pairs_and_disjoint_within_a_round(make):
    for n in SIZES:
        schedule = make(n)
        for planes in schedule.rounds:
            axes = [axis for plane in planes for axis in plane]
            assert len(axes) == len(set(axes)) == 2 * len(planes) > 0, n
        i, j = schedule.planes.T
        assert (0 <= i).all() and (i < j).all() and (j < n).all(), n


@each_constructor
def test_planes_rounds_and_counts_tell_the_same_story(make):
    schedule = make(11)
    flat = [plane for planes in schedule.rounds for plane in planes]
    assert schedule.dim == 11
    assert schedule.planes.dtype == torch.int64
    assert schedule.planes.tolist() == [list(plane) for plane in flat]
    assert schedule.num_angles == len(flat)
    assert len(schedule) == len(schedule.rounds)
    assert schedule.round_sizes == tuple(len(planes) for planes in schedule.rounds)
    assert schedule.round_of_plane.tolist() == [
        r for r, planes in enumerate(schedule.rounds) for _ in planes
    ]


@each_once
def test_every_plane_turns_exactly_once(make):
    for n in SIZES:
        planes = map(tuple, make(n).planes.tolist())
        assert sorted(planes) == list(itertools.combinations(range(n), 2)), n


def test_cosine_sine_has_as_many_angles_as_the_group_has_dimensions():
    assert all(givens.cosine_sine(n).num_angles == n * (n - 1) // 2 for n in SIZES)


def test_butterfly_joins_exactly_the_axes_that_differ_in_one_bit():
    for n in SIZES:
        planes = sorted(map(tuple, givens.butterfly(n).planes.tolist()))
        pairs = itertools.combinations(range(n), 2)
        assert planes == [(i, j) for i, j in pairs if (i ^ j).bit_count() == 1], n
    assert givens.butterfly(32).num_angles == 16 * 5


ROUNDS = {
    "round_robin": lambda n: n if n % 2 else n - 1,
    "odd_even": lambda n: n if n > 2 else 1,  # two wires have nothing to do in round two
    "hurwitz": lambda n: 2 * n - 3,
    "butterfly": log2,
}


@pytest.mark.parametrize("name", ROUNDS)
def test_number_of_rounds_follows_its_formula(name):
    lengths = {n: len(getattr(givens, name)(n)) for n in SIZES}
    assert lengths == {n: ROUNDS[name](n) for n in SIZES}


def test_crossing_takes_about_two_rounds_per_axis():
    assert all(n - 1 <= len(givens.crossing(n)) <= 2 * n - 2 for n in SIZES)
    for k in range(1, 9):
        assert len(givens.crossing(2**k)) == 2 * 2**k - 2 - k


def test_cosine_sine_takes_one_round_less_than_the_next_power_of_two():
    assert all(len(givens.cosine_sine(n)) <= 2 ** log2(n) - 1 for n in SIZES)
    for k in range(1, 9):
        assert len(givens.cosine_sine(2**k)) == 2**k - 1


# --- reduced words: the argument for "onto" (orthogonal.md 3.1) -----------------------------


def run_wires(planes, wires):
    """Where the wires end when each plane swaps two neighbours, or None if they are none."""
    wires = list(wires)
    for i, j in planes:
        a, b = sorted((wires.index(i), wires.index(j)))
        if b - a != 1:
            return None
        wires[a], wires[b] = wires[b], wires[a]
    return wires


@pytest.mark.parametrize("make", [givens.odd_even, givens.hurwitz], ids=lambda f: f.__name__)
def test_odd_even_and_hurwitz_are_reduced_words_of_the_reversal(make):
    for n in SIZES:
        assert run_wires(make(n).planes.tolist(), range(n)) == list(range(n))[::-1], n


def test_round_robin_of_odd_size_is_a_reduced_word():
    for n in SIZES[1::2]:
        wires = [p if p % 2 == 0 else n - 1 - p for p in range(n)]
        assert run_wires(givens.round_robin(n).planes.tolist(), wires) == wires[::-1], n


@pytest.mark.parametrize("name", ["odd_even", "hurwitz", "round_robin"])
def test_blocks_of_a_reduced_word_are_reduced_words(name):
    schedule = getattr(givens, name)(11).blocks(4)
    for block in (range(4), range(4, 8), range(8, 11)):
        planes = [plane for plane in schedule.planes.tolist() if plane[0] in block]
        wires = list(block)
        if name == "round_robin":
            wires = [w for w in (p if p % 2 == 0 else 10 - p for p in range(11)) if w in block]
        assert run_wires(planes, wires) == wires[::-1]


@pytest.mark.parametrize(
    "schedule",
    [givens.crossing(5), givens.crossing(6), givens.round_robin(4), givens.round_robin(6)],
    ids=str,
)
def test_no_order_of_wires_makes_these_reduced_words(schedule):
    planes = schedule.planes.tolist()
    orders = itertools.permutations(range(schedule.dim))
    assert all(run_wires(planes, wires) is None for wires in orders)


def test_the_outer_factor_of_crossing_exchanges_the_halves_in_order():
    for n in SIZES:
        a, b = list(range(n // 2)), list(range(n // 2, n))
        assert run_wires(givens.crossing(n).between(a, b).planes.tolist(), a + b) == b + a, n


# --- recursions, written out with code of their own -----------------------------------------


def turn(n, i, j, angle):
    """One rotation as an n x n matrix."""
    matrix = torch.eye(n, dtype=torch.float64)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[j, i], matrix[i, j] = math.sin(angle), -math.sin(angle)
    return matrix


def crossing_by_recursion(n, angle):
    """T(n) = X(A, B) (T(A) + T(B)), design.md 4.3; a direct sum is a product of its parts."""

    def halves(axes):
        return axes[: len(axes) // 2], axes[len(axes) // 2 :]

    def cross(a, b):
        if not a or not b:
            return torch.eye(n, dtype=torch.float64)
        if len(a) == len(b) == 1:
            return turn(n, a[0], b[0], angle[a[0], b[0]])
        (a1, a2), (b1, b2) = halves(a), halves(b)
        return cross(a1, b2) @ (cross(a1, b1) @ cross(a2, b2)) @ cross(a2, b1)

    def tower(axes):
        if len(axes) == 1:
            return torch.eye(n, dtype=torch.float64)
        a, b = halves(axes)
        return cross(a, b) @ (tower(a) @ tower(b))

    return tower(list(range(n)))


@pytest.mark.parametrize("n", [*range(2, 14), 16, 21])
def test_crossing_is_its_recursion(n):
    schedule = givens.crossing(n)
    angles = torch.randn(schedule.num_angles, dtype=torch.float64)
    angle = dict(zip(map(tuple, schedule.planes.tolist()), angles.tolist(), strict=True))
    matrix = givens.matrix(angles, schedule, impl="reference")
    torch.testing.assert_close(matrix, crossing_by_recursion(n, angle), rtol=0, atol=1e-14)


def cosine_sine_by_recursion(n, angle):
    """Q = (U1 + U2) CS (V1 + V2), orthogonal.md 4; takes its angles out of ``angle``."""

    def build(axes, start):
        if len(axes) == 1:
            return torch.ones(1, 1, dtype=torch.float64), 0
        p = math.ceil(len(axes) / 2)
        q = len(axes) - p
        v1, depth = build(axes[:p], start)
        v2, _ = build(axes[p:], start)
        t = [angle.pop((start + depth, axes[k], axes[p + k])) for k in range(q)]
        u1, _ = build(axes[:p], start + depth + 1)
        u2, _ = build(axes[p:], start + depth + 1)
        t = torch.tensor(t, dtype=torch.float64)
        c, s = torch.eye(p, dtype=torch.float64), torch.zeros(p, q, dtype=torch.float64)
        c[:q, :q], s[:q] = t.cos().diag(), t.sin().diag()
        middle = torch.cat([torch.cat([c, -s], 1), torch.cat([s.mT, t.cos().diag()], 1)])
        return torch.block_diag(u1, u2) @ middle @ torch.block_diag(v1, v2), 2 * depth + 1

    return build(list(range(n)), 0)[0]


@pytest.mark.parametrize("n", [*range(2, 14), 16, 21])
def test_cosine_sine_is_its_recursion(n):
    schedule = givens.cosine_sine(n)
    angles = torch.randn(schedule.num_angles, dtype=torch.float64)
    turns = zip(schedule.round_of_plane.tolist(), *schedule.planes.T.tolist(), strict=True)
    angle = dict(zip(turns, angles.tolist(), strict=True))
    matrix = givens.matrix(angles, schedule, impl="reference")
    torch.testing.assert_close(matrix, cosine_sine_by_recursion(n, angle), rtol=0, atol=1e-14)
    assert not angle, "every angle is used once"


# --- near angle zero ------------------------------------------------------------------------


def singular_values_at_zero(schedule):
    """Of the derivative of angles -> matrix where all angles are zero."""
    zero = torch.zeros(schedule.num_angles, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda angles: givens.matrix(angles, schedule))(zero)
    return torch.linalg.svdvals(jacobian.flatten(0, 1))


@pytest.mark.parametrize(
    "make", [*EACH_PLANE_ONCE, givens.butterfly], ids=lambda make: make.__name__
)
def test_schedules_without_repeats_are_isometric_at_zero(make):
    for n in (2, 3, 4, 7, 8):
        # Each generator holds two entries of size one, hence the factor.
        torch.testing.assert_close(
            singular_values_at_zero(make(n)),
            torch.full((make(n).num_angles,), math.sqrt(2), dtype=torch.float64),
        )


def test_cosine_sine_is_degenerate_at_zero():
    def rank(n):
        # U and V of a level give the same directions.
        return 0 if n == 1 else n // 2 + rank(n - n // 2) + rank(n // 2)

    for n in range(3, 12):
        values = singular_values_at_zero(givens.cosine_sine(n))
        assert (values > 1e-9).sum() == rank(n) < n * (n - 1) // 2, n


# --- restrictions ---------------------------------------------------------------------------

RESTRICTIONS = {
    "frame(3)": (lambda s: s.frame(3), lambda r, i, j: i < 3),
    "between([1, 4], [0, 6, 7])": (
        lambda s: s.between([4, 1], [7, 0, 6]),
        lambda r, i, j: {i, j} in [{a, b} for a in (1, 4) for b in (0, 6, 7)],
    ),
    "blocks(3)": (lambda s: s.blocks(3), lambda r, i, j: i // 3 == j // 3),
    "banded(2)": (lambda s: s.banded(2), lambda r, i, j: j - i in (1, 2)),
    "first_rounds(4)": (lambda s: s.first_rounds(4), lambda r, i, j: r in (0, 1, 2, 3)),
}


@each_constructor
@pytest.mark.parametrize("step", RESTRICTIONS)
@pytest.mark.parametrize("n", [9, 10])
def test_restriction_keeps_exactly_its_planes_round_by_round(make, step, n):
    restrict, rule = RESTRICTIONS[step]
    whole = make(n)
    kept = restrict(whole)
    rounds = [
        [plane for plane in planes if rule(r, *plane)] for r, planes in enumerate(whole.rounds)
    ]
    assert [list(planes) for planes in kept.rounds] == [planes for planes in rounds if planes]
    assert kept.dim == n
    assert kept.name == f"{whole.name}.{step}"


@each_once
def test_frame_keeps_as_many_angles_as_the_stiefel_manifold_has_dimensions(make):
    for n in (2, 5, 8, 33):
        for m in range(1, n + 1):
            assert make(n).frame(m).num_angles == n * m - m * (m + 1) // 2


@each_once
def test_between_keeps_as_many_angles_as_the_sets_have_pairs(make):
    assert make(11).between(range(4), {10, 7, 5}).num_angles == 4 * 3
    assert make(11).between(range(4), range(4, 11)).num_angles == 4 * 7


@pytest.mark.parametrize(
    ("schedule", "m"),
    [(givens.hurwitz(n), m) for n in (2, 5, 8) for m in range(1, n + 1)]
    + [(givens.crossing(n), n // 2) for n in (2, 3, 4, 7, 8, 13, 16)],
    ids=str,
)
def test_frame_leaves_the_first_columns_as_they_were(schedule, m):
    angles = torch.randn(schedule.num_angles, dtype=torch.float64)
    kept = angles[schedule.planes[:, 0] < m]
    full = givens.matrix(angles, schedule, impl="reference")
    frame = givens.matrix(kept, schedule.frame(m), impl="reference")
    torch.testing.assert_close(frame[:, :m], full[:, :m], rtol=0, atol=1e-14)


@each_constructor
def test_blocks_make_a_block_diagonal_matrix(make):
    schedule = make(11).blocks(4)
    angles = torch.randn(schedule.num_angles, dtype=torch.float64)
    matrix = givens.matrix(angles, schedule, impl="reference")
    block = torch.arange(11) // 4
    inside = block[:, None] == block
    assert (matrix[~inside] == 0).all()
    # The other two do not join all axes of a block.
    assert make not in EACH_PLANE_ONCE or (matrix[inside] != 0).all()


def test_first_rounds_are_followed_by_the_others():
    schedule = givens.crossing(9)
    angles = torch.randn(schedule.num_angles, dtype=torch.float64)
    first = schedule.first_rounds(5)
    rest = Schedule(9, schedule.rounds[5:])
    start, end = angles.split([first.num_angles, rest.num_angles])
    torch.testing.assert_close(
        givens.matrix(end, rest) @ givens.matrix(start, first), givens.matrix(angles, schedule)
    )
    assert len(first) == 5
    assert schedule.first_rounds(len(schedule)).planes.equal(schedule.planes)


def test_restrictions_chain_and_say_so():
    schedule = givens.crossing(8).frame(3).banded(4).first_rounds(2)
    assert schedule.name == "crossing(8).frame(3).banded(4).first_rounds(2)"
    assert len(schedule) == 2
    assert all(i < 3 and j - i <= 4 for i, j in schedule.planes.tolist())


BAD_RESTRICTIONS = {
    "frame of none": (lambda s: s.frame(0), "m must be an integer from 1 to 8, got 0"),
    "frame too wide": (lambda s: s.frame(9), "from 1 to 8, got 9"),
    "frame of a fraction": (lambda s: s.frame(2.0), "from 1 to 8, got 2.0"),
    "block of one": (lambda s: s.blocks(1), "size must be an integer from 2 to 8, got 1"),
    "block too large": (lambda s: s.blocks(9), "from 2 to 8, got 9"),
    "band of none": (lambda s: s.banded(0), "width must be an integer from 1 to 7, got 0"),
    "band too wide": (lambda s: s.banded(8), "from 1 to 7, got 8"),
    "no round": (lambda s: s.first_rounds(0), "k must be an integer from 1 to 11, got 0"),
    "too many rounds": (lambda s: s.first_rounds(12), "from 1 to 11, got 12"),
    "sets that meet": (lambda s: s.between([0, 1], [1, 2]), r"got \[0, 1\] and \[1, 2\]"),
    "axis too high": (lambda s: s.between([0], [8]), r"axes below 8, got \[0\] and \[8\]"),
    "axis below zero": (lambda s: s.between([-1], [2]), r"got \[-1\] and \[2\]"),
    "empty set": (lambda s: s.between([], [1]), "at least one plane"),
    "nothing left": (lambda s: s.blocks(2).frame(2).between([0], [2]), "keeps none"),
}


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize("case", BAD_RESTRICTIONS)
def test_bad_restriction_is_refused(case):
    restrict, message = BAD_RESTRICTIONS[case]
    with pytest.raises(ValueError, match=message):
        restrict(givens.crossing(8))


def test_a_schedule_that_never_had_the_plane_keeps_none_of_it():
    with pytest.raises(ValueError, match="keeps none"):
        givens.cosine_sine(8).between([0], [3])


# --- identity and hand-made schedules -------------------------------------------------------


def test_schedules_made_alike_are_equal():
    assert givens.crossing(8).frame(3) == givens.crossing(8).frame(3)
    assert hash(givens.crossing(8)) == hash(copy.copy(givens.crossing(8)))
    assert len({givens.crossing(8), givens.crossing(8), givens.crossing(9)}) == 2
    assert givens.crossing(5).between([1, 0], {2}) == givens.crossing(5).between((0, 1), [2])


@pytest.mark.parametrize(
    "other",
    [
        givens.crossing(9),
        givens.odd_even(8),
        givens.crossing(8).frame(3),
        Schedule(8, givens.crossing(8).rounds),
        "crossing(8)",
        None,
    ],
    ids=str,
)
def test_schedules_made_differently_differ(other):
    assert givens.crossing(8) != other


@pytest.mark.usefixtures("no_type_hook")
def test_names_do_not_depend_on_the_kind_of_integer():
    a, b = np.arange(2), np.arange(2, 5)
    assert givens.crossing(5).between(a, b) == givens.crossing(5).between([0, 1], [2, 3, 4])


def test_hand_made_schedules_are_equal_when_rounds_and_size_are():
    rounds = [[(0, 1), (2, 3)], [(1, 2)]]
    assert Schedule(4, rounds) == Schedule(4, [*rounds, []])
    assert Schedule(4, rounds) == Schedule(4, np.array(rounds, dtype=object).tolist())
    assert Schedule(4, rounds) != Schedule(5, rounds)
    assert Schedule(4, rounds) != Schedule(4, rounds[::-1])
    assert Schedule(4, rounds) != Schedule(4, [[(2, 3), (0, 1)], [(1, 2)]])
    assert Schedule(4, rounds) != Schedule(4, [[(0, 1)], [(2, 3)], [(1, 2)]])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
@pytest.mark.parametrize(
    "schedule", [givens.crossing(5).frame(2), Schedule(3, [[(0, 2)], [(1, 2)]])], ids=str
)
def test_copies_are_equal_and_work(schedule, clone):
    twin = clone(schedule)
    assert twin == schedule and hash(twin) == hash(schedule)
    assert twin.rounds == schedule.rounds
    assert twin.planes.equal(schedule.planes)
    angles = torch.randn(schedule.num_angles)
    assert givens.matrix(angles, twin).equal(givens.matrix(angles, schedule))


def test_hand_made_schedule_takes_any_iterables_of_pairs():
    schedule = Schedule(4, ([(j - 1, j)] for j in np.arange(1, 4)))
    assert schedule.rounds == (((0, 1),), ((1, 2),), ((2, 3),))
    assert schedule.name.startswith("Schedule(4, ")


BAD_ROUNDS = {
    "axis twice in a round": ([[(0, 1), (1, 2)]], r"disjoint, got \[\(0, 1\), \(1, 2\)\]"),
    "plane twice in a round": ([[(0, 1)], [(2, 3), (2, 3)]], "in round 1"),
    "wrong order": ([[(2, 1)]], r"0 <= i < j < 4, got \(2, 1\) in round 0"),
    "one axis": ([[(0, 1)], [(1, 1)]], r"got \(1, 1\) in round 1"),
    "axis too high": ([[(0, 4)]], r"got \(0, 4\)"),
    "axis below zero": ([[(-1, 2)]], r"got \(-1, 2\)"),
    "no rounds": ([], "at least one plane"),
    "empty rounds": ([[], []], "at least one plane"),
}


@pytest.mark.parametrize("case", BAD_ROUNDS)
def test_bad_rounds_are_refused(case):
    rounds, message = BAD_ROUNDS[case]
    with pytest.raises(ValueError, match=message):
        Schedule(4, rounds)


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize("n", [1, 0, -3, True, 4.0, "4"], ids=repr)
@pytest.mark.parametrize(
    "make", [*CONSTRUCTORS, lambda n: Schedule(n, [[(0, 1)]])], ids=lambda f: f.__name__
)
def test_bad_dimension_is_refused(make, n):
    with pytest.raises(ValueError, match=f"at least 2, got {n!r}"):
        make(n)
