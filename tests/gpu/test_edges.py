"""The edges' kernels against torch: every output and gradient (interpreted without a GPU)."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import gated_norm, short_convolution
from atlas_kernels.gpu import edges
from tests.support.device_problems import BFLOAT16_ON_A_GPU, DEVICE
from tests.support.problems import assert_close, relative_rms

# Relative RMS of float16, 11 bits, and bfloat16, 8: torch rounds after every step, the kernels once.
HALF_TOLERANCE = {torch.float16: 5e-3, torch.bfloat16: 4e-2}
# The kernels' error over torch's. On a GPU cuDNN's depthwise convolution sums in float32 and rounds once, as the kernel
# does: the two errors are then of one size, and either may be the larger one.
NO_WORSE = 1.2 if DEVICE == "cuda" else 1.05


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """A few tokens a program."""
    monkeypatch.setattr(edges, "BLOCK", 128)


def projected(batch: int, tokens: int, heads: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """q, k, v and output gate as the projection leaves them, [T, B, H 4 K] seen as [B, T, H, 4, K]."""
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randn(tokens, batch, heads * 4 * width, generator=generator)
    return drawn.to(DEVICE, dtype).requires_grad_()


def shaped(x: torch.Tensor, width: int) -> torch.Tensor:
    return x.transpose(0, 1).unflatten(-1, (-1, 4, width))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def found(outputs: tuple[torch.Tensor, ...], leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a fixed combination of them."""
    loss = sum((y * torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)).sum() for y in outputs)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {str(i): y for i, y in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))
    return {name: t.detach() for name, t in named.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize(("tokens", "width", "taps"), [(1, 8, 4), (2, 8, 2), (3, 16, 4), (16, 8, 1), (9, 24, 4)])
def test_short_convolution(tokens, width, taps, packed):
    x = projected(2, tokens, 3, width, torch.float32)
    filters, before = draw(3, 3 * width, taps), draw(2, 3 * 3 * width, taps - 1)
    positions = None
    if packed:  # the first document began two tokens earlier; another begins after each fifth token
        positions = torch.stack([(torch.arange(tokens) + 2) % 5, torch.arange(tokens) + 2]).to(DEVICE)
    leaves = {"x": x, "filters": filters, "before": before}

    def run(impl: str) -> dict[str, torch.Tensor]:
        return found(short_convolution(shaped(x, width)[..., :3, :], filters, before, positions, impl), leaves)

    assert_close(run("triton"), run("torch"))


def test_short_convolution_of_nothing_before():
    x, filters = projected(1, 5, 1, 8, torch.float32), draw(1, 24, 4)
    ours, theirs = (
        found(short_convolution(shaped(x, 8)[..., :3, :], filters, None, None, impl), {"x": x, "filters": filters})
        for impl in ("triton", "torch")
    )
    assert_close(ours, theirs)


def test_inputs_that_are_too_short_to_be_normalised():
    """Zero tokens, as a padded batch has them, and tiny ones."""
    x = torch.zeros(6, 1, 4 * 8, device=DEVICE)
    x[3:] = 1e-13
    x.requires_grad_()
    filters = torch.ones(1, 24, 2, device=DEVICE, requires_grad=True)
    ours, theirs = (
        found(short_convolution(shaped(x, 8)[..., :3, :], filters, None, None, impl), {"x": x, "filters": filters})
        for impl in ("triton", "torch")
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (16, 8), (9, 24)])
def test_gated_norm(tokens, width):
    y, x, gain = draw(2, tokens, 3, width), projected(2, tokens, 3, width, torch.float32), draw(3, width)
    leaves = {"y": y, "x": x, "gain": gain}
    ours, theirs = (
        found((gated_norm(y, shaped(x, width)[..., 3, :], gain, 1e-5, impl),), leaves) for impl in ("triton", "torch")
    )
    assert_close(ours, theirs)
    out = gated_norm(y, shaped(x, width)[..., 3, :], gain, 1e-5, "triton")
    assert out.transpose(0, 1).is_contiguous()  # as the output projection takes it


# Triton's interpreter cuts off where a GPU rounds to bfloat16.
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=BFLOAT16_ON_A_GPU)])
def test_in_half_precision(dtype):
    """Beside float64 from the same rounded inputs, no worse than torch in half precision."""
    width = 16
    x, filters = projected(2, 21, 2, width, dtype), draw(2, 3 * width, 4, dtype=dtype)
    before, gain, y = draw(2, 6 * width, 3, dtype=dtype), draw(2, width, dtype=dtype), draw(2, 21, 2, width)
    leaves = {"x": x, "filters": filters, "before": before, "gain": gain, "y": y}
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}

    def run(given: dict[str, torch.Tensor], impl: str) -> dict[str, torch.Tensor]:
        parts = shaped(given["x"], width)
        mixed = short_convolution(parts[..., :3, :], given["filters"], given["before"], None, impl)
        return found((*mixed, gated_norm(given["y"], parts[..., 3, :], given["gain"], 1e-5, impl)), given)

    expected, ours, theirs = run(exact, "torch"), run(leaves, "triton"), run(leaves, "torch")
    for name, true in expected.items():
        error = relative_rms(ours[name].double(), true)
        assert error < HALF_TOLERANCE[dtype], f"{name}: relative RMS {error:.1e}"
        assert error <= NO_WORSE * relative_rms(theirs[name].double(), true), name
    assert ours["0"].dtype == torch.float32 and ours["4"].dtype == dtype


@pytest.mark.parametrize("apart", [0, 1, 2], ids=["sequences", "tokens", "heads"])
def test_offsets_past_two_to_the_31st(apart):
    """Where the projection lies further apart than int32 counts; untouched pages take no memory."""
    far, width = 2**31 + 64, 8
    storage = torch.empty(far + 4096, dtype=torch.float16, device=DEVICE)
    strides = [1024, 256, 64, width, 1]
    strides[apart] = far
    projection = storage.as_strided((2, 2, 2, 4, width), strides)
    projection.copy_(draw(2, 2, 2, 4, width, dtype=torch.float16).detach())
    filters, gain, y = draw(2, 3 * width, 4), draw(2, width), draw(2, 2, 2, width)
    leaf = projection.requires_grad_()

    def run(x: torch.Tensor, impl: str) -> dict[str, torch.Tensor]:
        mixed = short_convolution(x[..., :3, :], filters.to(x.dtype), None, None, impl)[:3]
        return found((*mixed, gated_norm(y, x[..., 3, :], gain, 1e-5, impl)), {"x": x, "filters": filters, "y": y})

    expected = run(leaf.detach().double().requires_grad_(), "torch")
    for name, ours in run(leaf, "triton").items():
        assert relative_rms(ours.double(), expected[name]) < HALF_TOLERANCE[torch.float16], name
