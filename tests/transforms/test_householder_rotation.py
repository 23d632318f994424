"""The layer by thin products and by its matrix; test_contract.py has what all layers share."""

import io
import math

import pytest
import torch
from nflows.transforms import CompositeTransform, PointwiseAffineTransform
from torch.autograd.functional import jacobian

from flows import householder
from flows.transforms.householder import Householder1x1, HouseholderRotation

# Applied by thin products, and by the matrix.
CASES = {
    "default, even": lambda: HouseholderRotation(6, init="random"),
    "default, odd": lambda: HouseholderRotation(7, init="random"),
    "few": lambda: HouseholderRotation(9, 2, init="random"),
    "half": lambda: HouseholderRotation(6, 3, init="random"),
    "one": lambda: HouseholderRotation(5, 1, init="random"),
    "more than features": lambda: HouseholderRotation(3, 5, init="random"),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def transform(request):
    return request.param().double()


@pytest.fixture
def inputs(transform):
    return torch.randn(4, transform.features, dtype=torch.float64)


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_forward_multiplies_by_the_matrix_and_inverse_by_its_transpose(transform, inputs):
    matrix = transform.matrix()
    assert_close(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64))
    assert_close(transform(inputs)[0], inputs @ matrix.mT)
    assert_close(transform.inverse(inputs)[0], inputs @ matrix)


def test_inverse_undoes_forward(transform, inputs):
    outputs, _ = transform(inputs)
    assert not torch.allclose(outputs, inputs)
    assert_close(transform.inverse(outputs)[0], inputs)


def test_logabsdet_is_zero_as_autograd_finds(transform, inputs):
    for direction in (transform, transform.inverse):
        matrix = jacobian(lambda x, map=direction: map(x[None])[0][0], inputs[0])
        assert_close(torch.linalg.slogdet(matrix).logabsdet.item(), 0.0)
        logabsdet = direction(inputs)[1]
        assert logabsdet.shape == (4,) and logabsdet.count_nonzero() == 0
        logabsdet += 1  # dense and its own
        assert direction(inputs)[1].count_nonzero() == 0


def test_axes_between_batch_and_features_are_rows_too(transform):
    inputs = torch.randn(2, 3, transform.features, dtype=torch.float64)
    outputs, logabsdet = transform(inputs)
    assert_close(outputs.flatten(0, 1), transform(inputs.flatten(0, 1))[0])
    assert logabsdet.shape == (2,)
    assert transform(inputs[:0])[0].shape == inputs[:0].shape


def test_works_in_an_nflows_composite(transform, inputs):
    chain = CompositeTransform([transform, PointwiseAffineTransform(1.0, 2.0)]).double()
    outputs, logabsdet = chain(inputs)
    assert_close(outputs, 2 * transform(inputs)[0] + 1)
    assert_close(logabsdet, torch.full_like(logabsdet, transform.features * math.log(2)), 1e-6)
    assert_close(chain.inverse(outputs)[0], inputs)


def test_weights_survive_a_file(transform, inputs):
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    other = HouseholderRotation(*transform.vectors.shape[::-1], init="random").double()
    assert not torch.allclose(other(inputs)[0], transform(inputs)[0])
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(inputs)[0], transform(inputs)[0])
    fewer = HouseholderRotation(transform.features, len(transform.vectors) + 2, init="random")
    with pytest.raises(RuntimeError, match="size mismatch"):
        fewer.load_state_dict(transform.state_dict())


@pytest.mark.parametrize("reflections", [1, 2, 3, 4])
def test_matrix_is_built_only_for_many_reflections(monkeypatch, reflections):
    built = []
    monkeypatch.setattr(householder, "cwy", lambda v: built.append(v) or torch.eye(5))
    transform = HouseholderRotation(5, reflections, init="random")
    transform(torch.randn(3, 5)), transform.inverse(torch.randn(3, 5))
    assert len(built) == (2 if 2 * reflections > 5 else 0)


@pytest.mark.parametrize(("features", "reflections"), [(2, None), (5, None), (8, None), (9, 4)])
def test_starts_at_the_identity_and_can_leave_it(features, reflections):
    transform = HouseholderRotation(features, reflections).double()
    inputs = torch.randn(4, features, dtype=torch.float64)
    assert_close(transform(inputs)[0], inputs)
    assert_close(transform.matrix(), torch.eye(features, dtype=torch.float64))
    transform(inputs)[0].pow(3).sum().backward()
    assert (transform.vectors.grad != 0).any(1).all()


def test_random_start_is_random_each_time():
    first, second = (HouseholderRotation(4, init="random").matrix() for _ in range(2))
    assert (first - second).abs().max() > 0.1 and (first - torch.eye(4)).abs().max() > 0.1


@pytest.mark.parametrize("features", [2, 3, 4, 5, 8, 9])
def test_default_number_of_reflections_reaches_every_rotation(features):
    transform = HouseholderRotation(features).double()
    assert len(transform.vectors) == features - features % 2
    assert_close(torch.linalg.det(transform.matrix()).item(), 1.0)
    q, _ = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))
    q[:, 0] *= torch.linalg.det(q).sign()
    # H(v_i) takes what is left of column i to axis i; the last axis needs none if n is odd.
    left = q.clone()
    for i in range(len(transform.vectors)):
        with torch.no_grad():
            transform.vectors[i] = left[:, i] - torch.eye(features)[i]
        left = householder.reflect(left.mT, transform.vectors[i : i + 1].detach()).mT
    assert_close(transform.matrix(), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_outputs_keep_the_dtype(transform, inputs, dtype):
    outputs, logabsdet = transform.to(dtype)(inputs.to(dtype))
    assert outputs.dtype == logabsdet.dtype == transform.matrix().dtype == dtype


@pytest.mark.parametrize("reflections", [2, 6])
def test_autocast_rounds_at_most_the_product(reflections):
    transform, inputs = HouseholderRotation(6, reflections, init="random"), torch.randn(4, 6)
    plain = transform(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert transform.matrix().dtype == torch.float32
        for x in (inputs, inputs.bfloat16()):
            assert_close(transform(x)[0].float(), plain, 0.05)


@pytest.mark.parametrize("reflections", [2, 6])
def test_exported_program_takes_any_number_of_rows(reflections):
    transform = HouseholderRotation(6, reflections, init="random")
    rows = {"inputs": {0: torch.export.Dim("rows")}}
    program = torch.export.export(transform, (torch.randn(4, 6),), dynamic_shapes=rows)
    inputs = torch.randn(7, 6)
    torch.testing.assert_close(program.module()(inputs), transform(inputs))


BAD_ARGUMENTS = {
    "one feature": ((1,), {}, "features must be at least 2, got 1"),
    "no reflections": ((4, 0), {}, "reflections must be at least 1, got 0"),
    "odd identity": ((4, 3), {}, r"reflections must be even for init='identity'.* got 3"),
    "init": ((4,), {"init": "haar"}, "init must be 'identity' or 'random', got 'haar'"),
}


@pytest.mark.parametrize(
    ("sizes", "options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS
)
def test_bad_arguments_are_refused(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        HouseholderRotation(*sizes, **options)


def test_wrong_number_of_features_is_refused(transform, inputs):
    for wrong in (inputs[:, 1:], torch.cat([inputs, inputs], dim=1), inputs[0]):
        for direction in (transform, transform.inverse):
            with pytest.raises(ValueError, match=r"^inputs must have .*, got \("):
                direction(wrong)


def test_repr_tells_the_sizes():
    assert repr(HouseholderRotation(5, 2)) == "HouseholderRotation(features=5, reflections=2)"


@pytest.mark.parametrize("reflections", [2, None])
def test_images_are_reflected_along_their_channels(reflections):
    layer = Householder1x1(5, reflections, init="random").double()
    images = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    expected = torch.einsum("ij,bjhw->bihw", layer.matrix(), images)
    outputs, logabsdet = layer(images)
    assert_close(outputs, expected)
    assert_close(layer.inverse(outputs)[0], images)
    assert logabsdet.shape == (3,) and not logabsdet.any()


def test_only_images_have_channels():
    layer = Householder1x1(3)
    for wrong in (torch.zeros(4, 3), torch.zeros(4, 3, 2), torch.zeros(3, 3, 2, 2, 2)):
        with pytest.raises(ValueError, match=r"^inputs must be images .*, got \("):
            layer(wrong)
    with pytest.raises(ValueError, match="^channels must be at least 2, got 1"):
        Householder1x1(1)


@pytest.mark.parametrize("kind", [HouseholderRotation, Householder1x1])
def test_one_matrix_serves_the_way_back_and_the_way_forth(monkeypatch, kind):
    built, cwy = [], householder.cwy
    monkeypatch.setattr(householder, "cwy", lambda v: built.append(v) or cwy(v))
    layer = kind(6, init="random")
    inputs = torch.randn(4, 6, *([2, 2] if kind is Householder1x1 else []))
    outputs = layer(inputs)[0].detach()
    recovered, again, _ = layer.recover(outputs)
    assert len(built) == 2
    assert recovered.is_leaf and recovered.requires_grad
    assert_close(recovered.detach(), inputs, 1e-5)
    assert_close(again.detach(), outputs, 1e-5)


@pytest.mark.parametrize("reflections", [2, 6])
def test_autocast_does_not_round_single_precision(reflections):
    transform, inputs = HouseholderRotation(6, reflections, init="random"), torch.randn(4, 6)
    expected = transform(inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(inputs)[0], expected)
