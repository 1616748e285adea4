"""Feature maps against their formulas."""

import pytest
import torch

from atlas_kernels import initial_coefficients, lift


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


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: lift(x, "fourier"), "feature_map='fourier' is unknown; choose one of identity, hadamard"),
        (lambda x: lift(x, "hadamard"), "needs its coefficients"),
        (lambda x: lift(x, "hadamard", torch.ones(5, 3)), r"expected \[p\+1\] or \[H, p\+1\] with H=2"),
        (lambda x: initial_coefficients("hadamard", 0), "degree=0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 1, 2, 4))
