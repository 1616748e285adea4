"""The Triton Newton-Schulz against the torch one: forward and gradient, in the interpreter where there is no GPU."""

from itertools import product

import pytest
import torch

from atlas_kernels import newton_schulz as in_torch
from atlas_kernels.gpu import newton_schulz as kernels
from atlas_kernels.gpu.launch import TRITON_DTYPES
from atlas_kernels.gpu.newton_schulz import newton_schulz
from atlas_kernels.newton_schulz import COEFFICIENTS, schedule
from tests.support.device_problems import DEVICE, NEWTON_SCHULZ_TOLERANCE

DTYPES = (torch.float32, torch.float16)
SHAPES = [(16, 16), (24, 40), (5, 64, 64), (1, 40, 100), (128, 64), (2, 1, 20, 17), (70, 90), (30, 200)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def value_and_gradient(function, S, weight):
    leaf = S.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, weight.to(out.dtype))[0]


def assert_close(S, weight, steps=5, coefficients="jordan", **options):
    ours = value_and_gradient(lambda s: newton_schulz(s, steps, coefficients, **options), S, weight)
    true = value_and_gradient(lambda s: in_torch(s, steps, coefficients), S.double(), weight)
    bounds = NEWTON_SCHULZ_TOLERANCE[options.get("products", S.dtype)]
    for found, expected, bound in zip(ours, true, bounds, strict=True):
        assert found.shape == S.shape and found.dtype == S.dtype
        error = (found.double() - expected).norm() / expected.norm()
        assert error < bound, f"{error:.1e} is over {bound:.0e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    if DEVICE == "cuda" and dtype == torch.float32 and min(shape[-2:]) > kernels.SMALLER_OF_FLOAT32:
        pytest.skip("float32 products of this size do not fit a GPU")
    assert_close(normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype))


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(24, 40), (20, 150)])
def test_steps_and_coefficients(shape, coefficients, steps):
    S = normal(*shape)
    assert_close(S, normal(*shape, seed=1), steps, coefficients)


def test_products_of_another_dtype():
    assert_close(normal(3, 40, 60), normal(3, 40, 60, seed=1), products=torch.float16)


def falling(m=40, n=160):
    """Singular values that fall off, as those of a momentum do."""
    return normal(2, m, m) * 0.9 ** torch.arange(m, device=DEVICE) @ normal(2, m, n, seed=1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_falling_singular_values(dtype):
    S = falling()
    assert_close((S / S.abs().amax()).to(dtype), normal(*S.shape, seed=2, dtype=dtype))


def test_why_there_is_no_gram_form():
    """Factors rounded to bfloat16, sums not, in torch: two and three steps on one Gram matrix against five direct."""

    def rounded(a, b):
        return a.bfloat16().float() @ b.bfloat16().float()

    S = falling(64, 256)
    start = S / S.norm(dim=(-2, -1), keepdim=True)
    true = in_torch(S.double(), 5)
    eye = torch.eye(64, device=DEVICE)
    direct = gram = start
    table = schedule(5, "jordan")
    for a, b, c in table:
        A = rounded(direct, direct.mT)
        direct = a * direct + rounded(b * A + c * rounded(A, A), direct)
    for part in (table[:2], table[2:]):
        A, Q = rounded(gram, gram.mT), eye.expand(2, 64, 64)
        for a, b, c in part:
            P = a * eye + b * A + c * rounded(A, A)
            Q, A = rounded(P, Q), rounded(rounded(P, A), P)
        gram = rounded(Q, gram)
    direct_error, gram_error = ((found - true).norm() / true.norm() for found in (direct, gram))
    assert direct_error < 0.02 and gram_error > 5 * direct_error


def test_more_matrices_than_programs():
    """Those after the first take the same memory aside: each must come out as it does alone."""
    for shape in ((5, 24, 40), (5, 64, 100)):
        S, weight = normal(*shape), normal(*shape, seed=1)
        _, together = value_and_gradient(lambda s: newton_schulz(s, 2), S, weight)
        for i in range(len(S)):
            _, alone = value_and_gradient(lambda s: newton_schulz(s, 2), S[i], weight[i])
            assert torch.equal(together[i], alone)


def test_equal_reruns():
    S, weight = normal(3, 64, 100), normal(3, 64, 100, seed=1)
    first, second = (value_and_gradient(lambda s: newton_schulz(s, 5), S, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(3, 24, 40), (3, 40, 200), (1, 70, 90)])
def test_nothing_is_read_before_it_is_written(poisoned_memory, shape):
    assert torch.empty(3).isnan().all()
    dtype = torch.float16  # of every size on a GPU too
    assert_close(normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype))


def test_training_after_inference():
    kernels.coefficient_table.cache_clear()
    S = normal(1, 16, 20)
    with torch.inference_mode():
        newton_schulz(S, 3)
    assert_close(S, normal(1, 16, 20, seed=1), steps=3)


@pytest.mark.parametrize(
    "view",
    [lambda t: t.mT, lambda t: t[..., ::2], lambda t: t[:, 3:-2], lambda t: t[:1].expand(3, -1, -1)],
    ids=["transposed", "every second column", "cut", "expanded"],
)
def test_strides(view):
    S = view(normal(3, 40, 60))
    assert_close(S, view(normal(3, 40, 60, seed=1)))
    assert_close(S, view(normal(3, 40, 60, seed=1)).contiguous())


def test_a_tall_matrix_is_not_copied():
    tall = normal(2, 60, 20)
    out = newton_schulz(tall, 2)
    assert out.is_contiguous()
    torch.testing.assert_close(out.mT, newton_schulz(tall.mT, 2), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 16, 24), (2, 64, 100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero(shape, dtype):
    """Beside one that is not; the gradient is the limit's, a_1 ... a_k / 1e-7, at most float16's largest number."""
    S = normal(*shape, dtype=dtype)
    S[0] = 0
    weight = normal(*shape, seed=1, dtype=dtype)
    out, gradient = value_and_gradient(lambda s: newton_schulz(s, 5), S, weight)
    assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].isfinite().all() and out[1].any()
    assert gradient.isfinite().all()
    if dtype == torch.float32:
        _, expected = value_and_gradient(lambda s: in_torch(s, 5), S, weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected[1].abs().max().item())


def test_no_gradient_comes_in():
    S = normal(1, 16, 16)
    _, gradient = value_and_gradient(lambda s: newton_schulz(s, 5), S, torch.zeros_like(S))
    assert torch.equal(gradient, torch.zeros_like(S))


def test_small_gradients_survive_float16():
    """Scaled by a power of two, the same to the last bit."""
    S, weight = normal(1, 24, 40), normal(1, 24, 40, seed=1)
    gradients = [
        value_and_gradient(lambda s: newton_schulz(s, 5, products=torch.float16), S, weight * scale)[1]
        for scale in (1.0, 2.0**-30)
    ]
    assert torch.equal(gradients[0], gradients[1] * 2.0**30)


def test_offsets_past_two_to_the_31st():
    """Matrices, and rows of one matrix, that lie further apart than int32 counts; untouched pages take no memory."""
    far = 2**31 + 64
    storage = torch.empty(far + 40 * 40, dtype=torch.float16, device=DEVICE)
    matrices = storage.as_strided((2, 24, 40), (far, 40, 1))
    rows = storage.as_strided((1, 2, 40), (0, far, 1))
    for view in (matrices, rows):
        view.copy_(normal(*view.shape, dtype=torch.float16))
        assert_close(view, normal(*view.shape, seed=1, dtype=torch.float16))


def test_trivial():
    S = normal(2, 3, 4)
    assert newton_schulz(S, 0) is S
    assert newton_schulz(S[:0], 5).shape == (0, 3, 4)


def test_what_is_not_covered():
    S = normal(3, 4)
    for bad, words in (
        (normal(130, 140), "smaller side up to 128 and a larger up to 512"),
        (normal(16, 600), "smaller side up to 128 and a larger up to 512"),
        (S.double(), "S is torch.float64; the kernels take"),
        (S[0], "give matrices"),
    ):
        with pytest.raises(ValueError, match=words):
            newton_schulz(bad, 5)
    with pytest.raises(ValueError, match="products is torch.float64"):
        newton_schulz(S, 5, products=torch.float64)
    with pytest.raises(ValueError, match="coefficients='muon' is unknown"):
        newton_schulz(S, 5, "muon")
    with pytest.raises(ValueError, match="steps=-1"):
        newton_schulz(S, -1)


def test_what_no_device_can_run(monkeypatch):
    if kernels.INTERPRETED:
        with pytest.raises(ValueError, match="bfloat16 is wrong in Triton's interpreter"):
            newton_schulz(normal(3, 4), 5, products=torch.bfloat16)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="S is on cpu; the kernels need a GPU"):
        newton_schulz(torch.ones(3, 4), 5)


def test_every_size_has_a_plan():
    for m in (1, 16, 17, 64, 65, 128):
        for n in (1, 16, 100, 256, 512):
            for products in TRITON_DTYPES:
                for backward, arch in product((False, True), (80, 90, 100)):
                    plan = kernels.plan(min(m, n), max(m, n), products, backward, arch)
                    assert plan.M >= min(m, n) and (not plan.whole or plan.N >= max(m, n))
                    assert plan.warps in (1, 2, 4, 8) and plan.at_once >= 1
                    # The same matrices are held whole everywhere: what is stored between the steps hangs on it.
                    assert plan.whole == kernels.plan(min(m, n), max(m, n), products, backward).whole
