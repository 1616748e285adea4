"""Newton-Schulz: an orthogonal factor, the same in both forms, differentiable."""

import pytest
import torch

from atlas_kernels import newton_schulz
from atlas_kernels.newton_schulz import COEFFICIENTS, direct_form, gram_form, schedule

SHAPES = [(6, 6), (4, 20), (20, 4), (1, 5)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_of_a_well_conditioned_matrix(coefficients, shape):
    rank = min(shape)
    U, V = torch.linalg.qr(normal(shape[0], rank))[0], torch.linalg.qr(normal(shape[1], rank, seed=1))[0]
    S = (U * torch.linspace(0.3, 1.0, rank, dtype=torch.float64)) @ V.T
    singular = torch.linalg.svdvals(newton_schulz(S, 5, coefficients))
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_scale_free_and_zero():
    S = normal(3, 4, 9)
    torch.testing.assert_close(newton_schulz(S * 1000, 5), newton_schulz(S, 5), rtol=1e-6, atol=1e-7)
    zero = torch.zeros(2, 4, 9, requires_grad=True)
    out = newton_schulz(zero, 5)
    assert torch.equal(out, torch.zeros_like(out))
    out.sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_no_steps_is_the_identity():
    S = normal(3, 4)
    assert newton_schulz(S, 0) is S


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
def test_gram_form_equals_the_direct_form(coefficients):
    X = normal(2, 5, 12) / 8
    for steps in (1, 2, 5, 9):
        table = schedule(steps, coefficients)
        torch.testing.assert_close(gram_form(X, table), direct_form(X, table), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("decay", [1.0, 0.3, 0.1])
def test_rounding_stays_small(decay):
    """Singular values that fall off, as those of a momentum do; output and gradient of float32 against float64."""
    S = normal(64, 8, 8) * decay ** torch.arange(8, dtype=torch.float64) @ normal(64, 8, 32, seed=1)
    X = (S / S.norm(dim=(-2, -1), keepdim=True)).float()
    weight = normal(64, 8, 32, seed=2)

    def error(form):
        found = []
        for dtype in (torch.float32, torch.float64):
            x = X.to(dtype).requires_grad_()
            out = form(x, schedule(5, "jordan"))
            found.append((out.double(), torch.autograd.grad(out, x, weight.to(dtype))[0].double()))
        return [(ours - true).norm() / true.norm() for ours, true in zip(*found, strict=True)]

    assert max(error(direct_form) + error(gram_form)) < 1e-4


def test_polar_express_needs_fewer_steps_than_jordan():
    """Its table is made to reach one, jordan's only to grow fast."""
    S = normal(16, 16)
    error = {c: (torch.linalg.svdvals(newton_schulz(S, 8, c)) - 1).abs().max() for c in COEFFICIENTS}
    assert error["polar_express"] < 0.02 < error["jordan"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 64), (40, 8), (16, 16)])
def test_half_precision_is_float32_rounded_once(dtype, shape):
    """At sizes whose squares overflow float16; bad ones are as exact as good ones."""
    for size in (1e-3, 1.0, 1e3, 6e4):
        for S in (normal(2, *shape), normal(2, *shape) * 0.03 ** torch.arange(shape[1], dtype=torch.float64)):
            S = (S / S.abs().max() * size).to(dtype).requires_grad_()
            exact = S.detach().float().requires_grad_()
            out, true = newton_schulz(S, 5), newton_schulz(exact, 5)
            assert out.dtype == dtype and out.abs().max() > 0.1
            torch.testing.assert_close(out, true.to(dtype), rtol=0, atol=0)
            weight = normal(2, *shape, seed=3).to(dtype)
            gradients = torch.autograd.grad(out, S, weight)[0], torch.autograd.grad(true, exact, weight.float())[0]
            torch.testing.assert_close(gradients[0], gradients[1].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_autocast_changes_nothing(dtype):
    S = (normal(3, 8, 20) * 1000).to(dtype)
    expected = newton_schulz(S, 5)
    with torch.autocast("cpu", torch.bfloat16):
        found = newton_schulz(S, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_shapes_are_known_without_numbers(dtype):
    assert newton_schulz(torch.empty(2, 5, 3, dtype=dtype, device="meta"), 5).shape == (2, 5, 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient(shape):
    S = normal(2, *shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: newton_schulz(s, 3), S, atol=1e-7)


def test_bad_arguments():
    with pytest.raises(ValueError, match="coefficients='muon' is unknown; choose one of jordan, polar_express"):
        newton_schulz(normal(3, 3), 5, "muon")
    with pytest.raises(ValueError, match="steps=-1"):
        newton_schulz(normal(3, 3), -1)
