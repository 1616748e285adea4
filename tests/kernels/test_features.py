"""Feature maps against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from atlas_kernels import initial_coefficients, lift, lifted_width
from atlas_kernels.features import _tensor_sketch


def test_hadamard_is_the_polynomial_of_each_element():
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(1, 2, 3, 4).requires_grad_()
    a = torch.tensor([[0.1, 1.0, 0.5, 0.2]] * 3, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [3.0]])
    expected = sum(a[:, i, None] * x**i for i in range(4))
    torch.testing.assert_close(lift(x, "hadamard", a), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lift(x, "hadamard", a[0]), sum(a[0, i] * x**i for i in range(4)), rtol=1e-12, atol=1e-14)
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: lift(x, "hadamard", a), (x, a))


def test_identity_is_x():
    x = torch.ones(1, 1, 1, 2)
    assert lift(x, "identity") is x and initial_coefficients("identity", 2) is None


def test_start_is_the_taylor_series_without_its_constant():
    assert torch.equal(initial_coefficients("hadamard", 3), torch.tensor([0.0, 1.0, 1 / 2, 1 / 6]))


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_taylor_inner_products_are_the_polynomial(degree):
    q, k = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    roots = torch.linspace(0.3, 1.2, degree + 1, dtype=torch.float64).expand(3, -1)
    lifted = [lift(x, "taylor", roots) for x in (q, k)]
    assert lifted[0].shape[-1] == lifted_width("taylor", 4, degree) == math.comb(4 + degree, degree)
    products = (q * k).sum(-1)
    expected = sum(roots[:, i] ** 2 * products**i for i in range(degree + 1))
    torch.testing.assert_close((lifted[0] * lifted[1]).sum(-1), expected, rtol=1e-12, atol=1e-12)


def test_taylor_has_gradients():
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    roots = initial_coefficients("taylor", 3).double().requires_grad_()
    torch.testing.assert_close(roots.detach() ** 2, torch.tensor([1, 1, 1 / 2, 1 / 6], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x, r: lift(x, "taylor", r), (x, roots))


def test_sketches_are_unbiased():
    """Their mean over seeds approaches (q . k)^i; the mean's own error bounds how near."""
    q, k = F.normalize(torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=-1)
    k = F.normalize(q + 0.5 * k, dim=-1)
    for degree in (2, 3):
        found = torch.stack(
            [_tensor_sketch(q, degree, 32, seed) @ _tensor_sketch(k, degree, 32, seed) for seed in range(400)]
        )
        error = (found.mean() - (q @ k) ** degree).abs()
        assert error < 4 * found.std() / math.sqrt(len(found)) and found.std() < 1


def test_a_wide_sketch_is_near_the_kernel():
    x = F.normalize(torch.randn(1, 8, 1, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    roots = initial_coefficients("sketch", 3)
    lifted = lift(x, "sketch", roots, sketch_width=2048)[0, :, 0]
    assert lifted.shape[-1] == lifted_width("sketch", 16, 3, 2048)
    exact = lift(x, "taylor", roots)[0, :, 0]
    assert (lifted @ lifted.T - exact @ exact.T).abs().max() < 0.1


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: lift(x, "fourier"), "'fourier' is unknown; choose one of identity, hadamard, taylor, sketch"),
        (lambda x: lift(x, "hadamard"), "needs its coefficients"),
        (lambda x: lift(x, "hadamard", torch.ones(5, 3)), r"expected \[p\+1\] or \[H, p\+1\] with H=2"),
        (lambda x: initial_coefficients("hadamard", 0), "degree=0"),
        (lambda x: lift(x, "sketch", torch.ones(3)), "sketch_width=0 leaves"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 1, 2, 4))
