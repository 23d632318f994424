import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jacfwd, jacrev, vmap

from flows.householder import cwy, reflect, stiefel_cwy

# (k, n): one, some, all but one, all, more than n; n odd and even, one axis alone.
SHAPES = [(1, 1), (1, 2), (2, 2), (1, 5), (3, 5), (4, 5), (5, 5), (6, 8), (8, 8), (9, 4), (33, 33)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def product_of_reflections(vectors):
    """The definition: H(v_1) ... H(v_k), one reflection after another, in float64."""
    vectors = vectors.double()
    product = torch.eye(vectors.shape[-1], dtype=torch.float64)
    for v in vectors:
        product = product - 2 * torch.outer(product @ v, v) / v.dot(v)
    return product


def assert_equal_to(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# --- values ---------------------------------------------------------------------------------


def test_one_reflection_is_the_one_worked_out_by_hand():
    # I - 2 v v^T / 25 for v = (3, 4)
    vectors = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[0.28, -0.96], [-0.96, -0.28]], dtype=torch.float64)
    assert_equal_to(cwy(vectors), expected, 1e-15)
    assert_equal_to(stiefel_cwy(vectors), expected[:, :1], 1e-15)
    assert_equal_to(reflect(vectors[0], vectors), -vectors[0], 1e-15)


@every_shape
def test_cwy_is_the_product_of_the_reflections_first_one_leftmost(shape):
    vectors = draw(*shape)
    assert_equal_to(cwy(vectors), product_of_reflections(vectors))


@every_shape
def test_cwy_has_the_determinant_of_so_many_reflections(shape):
    assert_equal_to(torch.linalg.det(cwy(draw(*shape))).item(), (-1.0) ** shape[0])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] <= s[1]], ids=str)
def test_stiefel_cwy_is_the_first_columns_of_the_product(shape):
    vectors, k = draw(*shape), shape[0]
    frame = stiefel_cwy(vectors)
    assert_equal_to(frame, product_of_reflections(vectors)[:, :k])
    assert_equal_to(frame.mT @ frame, torch.eye(k, dtype=torch.float64))


@both_ways
@every_shape
def test_reflect_multiplies_by_the_matrix_or_its_transpose(shape, inverse):
    vectors = draw(*shape)
    matrix = product_of_reflections(vectors)
    for rows in [(), (1,), (7,), (2, 3), (0,), (0, 2)]:
        x = draw(*rows, shape[1])
        expected = x @ (matrix if inverse else matrix.mT)
        assert_equal_to(reflect(x, vectors, inverse=inverse), expected)


@both_ways
def test_reflect_takes_vectors_of_each_row(inverse):
    x, vectors = draw(2, 3, 5), draw(2, 3, 4, 5)
    y = reflect(x, vectors, inverse=inverse)
    for k in [(0, 0), (0, 2), (1, 1)]:
        assert_equal_to(y[k], reflect(x[k], vectors[k], inverse=inverse))
    assert_equal_to(reflect(y, vectors, inverse=not inverse), x)
    assert reflect(x[:, :0], vectors[:, :0], inverse=inverse).shape == (2, 0, 5)


@pytest.mark.parametrize("function", [cwy, stiefel_cwy])
def test_batch_axes_are_kept(function):
    vectors = draw(2, 3, 4, 5)
    results = function(vectors)
    for k in [(0, 0), (0, 2), (1, 1)]:
        assert_equal_to(results[k], function(vectors[k]))
    assert function(vectors[:, :0]).shape == (2, 0, *results.shape[2:])


def test_no_reflections_are_the_identity():
    assert torch.equal(cwy(draw(0, 3)), torch.eye(3, dtype=torch.float64))
    assert stiefel_cwy(draw(0, 3)).shape == (3, 0)
    assert torch.equal(reflect(x := draw(2, 3), draw(0, 3)), x)


# --- precision ------------------------------------------------------------------------------


# With the largest entry of Q^T Q - I in float32; unit vectors are off by about an ulp, which
# adds up where all point the same way.
SPREADS = {
    "independent": (lambda k, n: torch.randn(k, n), 5e-6),
    "pairs": (lambda k, n: torch.randn(k // 2, n).repeat_interleave(2, dim=0), 5e-6),
    "almost equal": (lambda k, n: torch.randn(n) + 1e-3 * torch.randn(k, n), 3e-5),
}


@pytest.mark.parametrize(("spread", "bound"), SPREADS.values(), ids=SPREADS)
def test_float32_stays_orthogonal_and_near_float64(spread, bound):
    vectors = spread(256, 256)
    matrix, frame = cwy(vectors), stiefel_cwy(vectors[:128])
    assert matrix.dtype == frame.dtype == torch.float32
    assert_equal_to(matrix.double() @ matrix.double().mT, torch.eye(256).double(), bound)
    assert_equal_to(frame.double().mT @ frame.double(), torch.eye(128).double(), bound)
    assert_equal_to(matrix.double(), cwy(vectors.double()), 10 * bound)
    x = torch.randn(10, 256)
    back = reflect(reflect(x, vectors), vectors, inverse=True)
    assert_equal_to(back, x, 10 * bound)


def test_pairs_of_equal_vectors_cancel():
    vectors = draw(3, 7).repeat_interleave(2, dim=0)
    assert_equal_to(cwy(vectors), torch.eye(7, dtype=torch.float64))


@pytest.mark.parametrize("scale", [-1.0, 1e-15, 1e15])
def test_scale_of_the_vectors_does_not_matter(scale):
    vectors, x = draw(4, 5, dtype=torch.float32), torch.randn(3, 5)
    scaled = vectors * torch.tensor([scale, 1.0, scale, 2.0])[:, None]
    for function in (cwy, stiefel_cwy, lambda v: reflect(x, v)):
        assert_equal_to(function(scaled), function(vectors), 2e-6)


def test_zero_vector_spoils_its_own_matrix_and_no_other():
    vectors = draw(3, 2, 4)
    vectors[1, 0] = 0
    for result in (cwy(vectors), stiefel_cwy(vectors), reflect(draw(3, 4), vectors)):
        assert result[1].isnan().any() and result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_worked_on_in_float32(dtype):
    vectors, x = draw(6, 8, dtype=dtype), draw(3, 8, dtype=dtype)
    exact = vectors.float(), x.float()
    assert torch.equal(cwy(vectors), cwy(exact[0]).to(dtype))
    assert torch.equal(stiefel_cwy(vectors), stiefel_cwy(exact[0]).to(dtype))
    assert torch.equal(reflect(x, vectors), reflect(exact[1], exact[0]).to(dtype))
    assert torch.equal(reflect(x, exact[0]), reflect(exact[1], exact[0]).to(dtype))


def test_autocast_changes_nothing():
    vectors, x = draw(6, 8, dtype=torch.float32), torch.randn(3, 8)
    plain = cwy(vectors), stiefel_cwy(vectors), reflect(x, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        results = cwy(vectors), stiefel_cwy(vectors), reflect(x, vectors)
        assert (x @ plain[0]).dtype == torch.bfloat16  # the mode is on
    assert all(map(torch.equal, results, plain))


def test_arguments_are_left_as_they_were():
    vectors, x = draw(3, 5), draw(2, 5)
    before = vectors.clone(), x.clone()
    cwy(vectors), stiefel_cwy(vectors), reflect(x, vectors).zero_()
    assert torch.equal(vectors, before[0]) and torch.equal(x, before[1])


# --- derivatives ----------------------------------------------------------------------------

FUNCTIONS = {
    "cwy": lambda vectors, x: cwy(vectors),
    "stiefel": lambda vectors, x: stiefel_cwy(vectors),
    "reflect": lambda vectors, x: reflect(x, vectors),
    "reflect back": lambda vectors, x: reflect(x, vectors, inverse=True),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
@pytest.mark.parametrize("shape", [(1, 3), (3, 4), (3, 3), (2, 2, 3)], ids=str)
def test_derivatives_agree_with_finite_differences(function, shape):
    vectors = draw(*shape).requires_grad_()
    x = draw(2, shape[-1]).requires_grad_()
    assert gradcheck(function, (vectors, x))
    assert gradgradcheck(function, (vectors, x))


@every_function
def test_derivatives_are_finite_where_pairs_cancel(function):
    vectors = draw(2, 5).repeat_interleave(2, dim=0).requires_grad_()
    assert gradcheck(function, (vectors, draw(2, 5).requires_grad_()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@every_function
def test_function_transforms_agree_with_autograd(function):
    vectors, x = draw(3, 2, 4), draw(3, 4)

    def loss(vectors):
        return function(vectors, x).pow(3).sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, v) for v in vectors])
    torch.testing.assert_close(vmap(grad(loss))(vectors), expected)
    torch.testing.assert_close(vmap(jacfwd(loss))(vectors), expected)
    hessian = torch.autograd.functional.hessian(loss, vectors[0])
    torch.testing.assert_close(jacfwd(jacrev(loss))(vectors[0]), hessian)


@every_function
def test_compiler_takes_the_whole_function(function):
    vectors, x = draw(3, 5).requires_grad_(), draw(2, 5)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    results, expected = compiled(vectors, x), function(vectors, x)
    torch.testing.assert_close(results, expected)
    gradients = [torch.autograd.grad(y.pow(3).sum(), vectors) for y in (results, expected)]
    torch.testing.assert_close(*gradients)


# --- refusals -------------------------------------------------------------------------------

BAD_VECTORS = {
    "one axis": (torch.ones(3), r"float32 of shape \(3,\)"),
    "none": (torch.tensor(1.0), r"float32 of shape \(\)"),
    "integer": (torch.ones(2, 3).long(), r"int64 of shape \(2, 3\)"),
    "complex": (torch.ones(2, 3) + 0j, r"complex64 of shape \(2, 3\)"),
}


@pytest.mark.parametrize(("vectors", "message"), BAD_VECTORS.values(), ids=BAD_VECTORS)
def test_bad_vectors_are_refused(vectors, message):
    for function in (cwy, stiefel_cwy, lambda vectors: reflect(torch.ones(3), vectors)):
        with pytest.raises(
            ValueError, match=rf"^vectors must .* \(\.\.\., k, n\), got .*{message}"
        ):
            function(vectors)


def test_more_vectors_than_axes_give_no_frame():
    with pytest.raises(ValueError, match=r"^vectors must be at most .* got \(2, 4, 3\)"):
        stiefel_cwy(torch.ones(2, 4, 3))


BAD_INPUTS = {
    "width": (torch.ones(2, 4), torch.ones(2, 3), r"^x must .* 3 entries.* \(2, 4\)"),
    "number": (torch.tensor(1.0), torch.ones(2, 3), r"^x must .* got torch.float32 of shape \(\)"),
    "integer": (torch.ones(2, 3).int(), torch.ones(2, 3), r"^x must .* got torch.int32"),
    "rows": (torch.ones(2, 3), torch.ones(4, 1, 3), r"^vectors must .*\(2,\).* got \(4, 1, 3\)"),
}


@pytest.mark.parametrize(("x", "vectors", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_that_do_not_fit_are_refused(x, vectors, message):
    with pytest.raises(ValueError, match=message):
        reflect(x, vectors)
