"""The baselines' mixers, GRU, LSTM, DeltaNet, Gated DeltaNet: they are what their definitions say, and they train."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import DeltaConfig, RecurrentConfig, load, model_differences, to_toml
from atlas_megatron.config.checks import validate
from atlas_megatron.train import main
from tests.model.test_model import UNCOUNTED
from tests.support import tiny_run
from tests.support.single_mixer import build_mixer
from tests.support.small_model import SMALL

SYMBOLS = "RLDG"
HEADS, WIDTH = 4, 8
CONFIG = replace(
    SMALL, recurrent=RecurrentConfig(heads=HEADS, head_dim=WIDTH), delta=DeltaConfig(heads=HEADS, head_dim=WIDTH)
)


def mixer_in_double(symbol: str) -> torch.nn.Module:
    """In float64, its parameters moved off their start."""
    mixer = build_mixer(symbol, CONFIG).double()
    mixer.config.params_dtype = torch.float64
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return mixer


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.usefixtures("single_process_megatron")
def test_every_parameter_learns(symbol: str) -> None:
    mixer = build_mixer(symbol, CONFIG)
    mixer(torch.randn(16, 2, 32))[0].square().mean().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().amax(tuple(range(1, parameter.dim()))).min() > 0, name


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.usefixtures("single_process_megatron")
def test_a_token_sees_all_before_it_and_nothing_after(symbol: str) -> None:
    mixer = build_mixer(symbol, CONFIG)
    x = torch.randn(90, 2, 32)
    changed = x.clone()
    changed[70:] = torch.randn(20, 2, 32)
    with torch.no_grad():
        y, z = mixer(x)[0], mixer(changed)[0]
    assert torch.equal(y[:70], z[:70])
    assert not torch.allclose(y[70], z[70])
    x.requires_grad_()
    mixer(x)[0][80].sum().backward()
    assert (x.grad[:81, 0].norm(dim=-1) > 0).all() and (x.grad[81:] == 0).all()


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.parametrize("lengths", [[66, 24], [1, 2, 3, 64, 20], [1] * 90], ids=len)
@pytest.mark.usefixtures("single_process_megatron")
def test_pieces_are_the_whole_and_so_are_their_gradients(symbol: str, lengths: list[int]) -> None:
    mixer = mixer_in_double(symbol)
    x = torch.randn(90, 2, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(90, 2, 32, dtype=torch.float64)
    results = []
    for cuts in ([90], lengths):
        state, parts = None, []
        for piece in x.split(cuts):
            y, state = mixer.mix(piece, state)
            parts.append(y)
        y = torch.cat(parts)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.usefixtures("single_process_megatron")
def test_packed_documents_are_separate_sequences(symbol: str) -> None:
    """Outputs and gradients; over a cut within a document too."""
    mixer = mixer_in_double(symbol)
    lengths = [[5, 1, 70, 14], [65, 25]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    x = torch.randn(90, 2, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(90, 2, 32, dtype=torch.float64)
    rows = [
        torch.cat([mixer.mix(document, None)[0] for document in x[:, [row]].split(documents)])
        for row, documents in enumerate(lengths)
    ]
    first, state = mixer.mix(x[:20], None, positions[:, :20])
    second, _ = mixer.mix(x[20:], state, positions[:, 20:])
    results = []
    for y in (torch.cat(rows, 1), mixer.mix(x, None, positions)[0], torch.cat([first, second])):
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *mixer.parameters()])))
    for alone, packed, pieces in zip(*results, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pieces, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("symbol", SYMBOLS)
@pytest.mark.usefixtures("single_process_megatron")
def test_closed_forms_match_the_built_model(symbol: str) -> None:
    from atlas_megatron.model.build import build_model, flops_per_token, num_params

    # Widths that differ, so that none stands for another.
    recurrent, delta = RecurrentConfig(heads=4, head_dim=6), DeltaConfig(heads=2, head_dim=12, conv_size=3)
    model = replace(CONFIG.model, pattern=f"{symbol}-")
    config = replace(CONFIG, model=model, recurrent=recurrent, delta=delta)
    built = build_model(config)
    assert num_params(config) == sum(p.numel() for p in built.parameters())
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, torch.no_grad():
        built(tokens, None, None)
    flops = flops_per_token(config)
    assert flops.forward == pytest.approx(counter.get_total_flops() / 32, rel=0.02)
    assert (flops.inner > 0) == (symbol in "DG")


@pytest.mark.parametrize(("symbol", "kind", "gates"), [("R", torch.nn.GRU, 3), ("L", torch.nn.LSTM, 4)])
@pytest.mark.usefixtures("single_process_megatron")
def test_heads_are_one_cell_of_torch_with_block_diagonal_matrices(symbol: str, kind: type, gates: int) -> None:
    mixer = mixer_in_double(symbol)
    cell = kind(32, HEADS * WIDTH).double()
    rows = mixer.linear_in.weight.unflatten(0, (HEADS, gates + 1, WIDTH))
    own = mixer.bias.transpose(0, 1).flatten(1)  # [4, heads x width]
    with torch.no_grad():
        cell.weight_ih_l0.copy_(rows[:, :gates].transpose(0, 1).flatten(0, 2))
        blocks = mixer.recurrence.transpose(0, 1)  # [gates, heads, width, width]
        cell.weight_hh_l0.copy_(torch.cat([torch.block_diag(*gate) for gate in blocks]))
        cell.bias_ih_l0.copy_(own[:gates].flatten())
        cell.bias_hh_l0.zero_()
        if symbol == "R":
            cell.bias_hh_l0[-HEADS * WIDTH :] = own[3]
    x = torch.randn(19, 2, 32, dtype=torch.float64)
    with torch.no_grad():
        hidden, _ = cell(x)
        branch = x @ rows[:, gates].flatten(0, 1).mT
        expected = (hidden * torch.nn.functional.silu(branch)) @ mixer.linear_out.weight.mT
        torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-12, atol=1e-12)


def delta_loop(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_alpha: Tensor | None, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The papers' recurrence, token by token; S [B, H, V, K]."""
    if S is None:
        S = v.new_zeros(*v[:, 0].shape, k.shape[-1])
    reads = []
    for t in range(q.shape[1]):
        if log_alpha is not None:
            S = log_alpha[:, t].exp()[..., None, None] * S
        error = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + beta[:, t, :, None, None] * error.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        reads.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
    return torch.stack(reads, 1), S


@pytest.mark.parametrize("symbol", "DG")
@pytest.mark.usefixtures("single_process_megatron")
def test_the_delta_layers_are_their_definition(symbol: str) -> None:
    """Every line of the layer again, in plain torch and token by token."""
    mixer = mixer_in_double(symbol)
    x = torch.randn(70, 2, 32, dtype=torch.float64)
    with torch.no_grad():
        rows = mixer.linear_qkvg.weight.unflatten(0, (HEADS, 4, WIDTH))
        q, k, v, branch = torch.einsum("tbd,hgkd->gbthk", x, rows).unbind(0)
        taps = mixer.convolution.unflatten(1, (3, WIDTH))  # [H, 3, K, size]

        def convolved(signal: Tensor, which: int) -> Tensor:
            padded = torch.nn.functional.pad(signal, (0, 0, 0, 0, 3, 0))
            summed = sum(padded[:, i : i + 70] * taps[:, which, :, i] for i in range(4))
            return torch.nn.functional.silu(summed)

        q, k, v = (convolved(signal, which) for which, signal in enumerate((q, k, v)))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        gates = (x @ mixer.linear_gates.weight.mT).transpose(0, 1).unflatten(-1, (HEADS, -1))
        log_alpha = None
        if symbol == "G":
            step = (1 + (gates[..., 1] + mixer.decay_bias).exp()).log()
            log_alpha = -mixer.decay_rate_log.exp() * step
        y, _ = delta_loop(q, k, v, 1 / (1 + (-gates[..., 0]).exp()), log_alpha)
        y = y / (y.square().mean(-1, keepdim=True) + CONFIG.model.norm_epsilon).sqrt() * mixer.norm_gain
        expected = (y * torch.nn.functional.silu(branch)).flatten(2).transpose(0, 1) @ mixer.linear_out.weight.mT
        torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-10, atol=1e-10)


def rule_problem(dtype: torch.dtype, log_alpha: Tensor) -> list[Tensor]:
    """q, k, v, beta, log_alpha: 40 tokens, 2 sequences, 3 heads; k and q of length 1, all of them leaves."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 40, 3, 8, generator=generator, dtype=torch.float64)
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    beta = torch.rand(2, 40, 3, generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (q, k, v, beta, log_alpha.expand(2, 40, 3))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("decay", ["usual", "down to the least", "none at all"])
def test_a_decay_however_strong_is_the_recurrence(decay: str, dtype: torch.dtype, tolerance: float) -> None:
    """alpha from 1 to e^-30, where v / alpha is 1e13 v: outputs and every gradient."""
    from atlas_kernels.gated_delta import LEAST_LOG_DECAY, gated_delta_rule

    drawn = torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    log_alpha = {"usual": -drawn, "down to the least": LEAST_LOG_DECAY * drawn.round(), "none at all": 0 * drawn}[decay]
    given = rule_problem(dtype, log_alpha)
    exact = [t.detach().double().requires_grad_() for t in given]
    found, expected = gated_delta_rule(*given)[0], delta_loop(*exact)[0]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    compared = [(found, expected)]
    compared += zip(
        torch.autograd.grad((found * weight).sum(), given),
        torch.autograd.grad((expected * weight).sum(), exact),
        strict=True,
    )
    for ours, theirs in compared:
        assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp(min=1.0)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("gated", [False, True], ids=["delta", "gated"])
def test_the_arguments_of_flash_linear_attention(gated: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contract, as its documentation has it, stands in for it: states [B, H, K, V], log decays, a scale of q."""
    from atlas_megatron.mixers.delta import flash_kernel

    def contract(q, k, v, beta, g, scale, initial_state, output_final_state):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and output_final_state
        q, k, v = (t.double() for t in (q, k, v))
        start = None if initial_state is None else initial_state.mT
        y, after = delta_loop(scale * q, k, v, beta, g, start)
        return y.to(torch.bfloat16), after.mT

    def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
        return contract(q, k, v, beta, None, scale, initial_state, output_final_state)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        return contract(q, k, v, beta, g, scale, initial_state, output_final_state)

    for name in ("fla", "fla.ops", "fla.ops.delta_rule", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.delta_rule"].chunk_delta_rule = chunk_delta_rule
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    log_alpha = -torch.rand(2, 40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    given = [t.detach() for t in rule_problem(torch.float64, log_alpha)]
    if not gated:
        given[4] = torch.zeros_like(given[4])
    documents, positions = [40], None
    if packed:
        documents = [9, 14, 17]
        positions = torch.cat([torch.arange(n) for n in documents]).expand(2, 40)
    alone = [delta_loop(*document)[0] for document in zip(*(t.split(documents, 1) for t in given), strict=True)]
    expected = torch.cat(alone, 1)
    memory, parts = None, []
    for piece in (slice(0, 17), slice(17, 40)):
        q, k, v, beta, decay = (t[:, piece] for t in given)
        places = None if positions is None else positions[:, piece]
        y, memory = flash_kernel(q, k, v, beta, decay if gated else None, places, memory)
        parts.append(y)
    assert (torch.cat(parts, 1).double() - expected).norm() < 1e-2 * expected.norm()


def test_flash_linear_attention_is_refused_where_it_cannot_run() -> None:
    from atlas_kernels.gated_delta import gated_delta_rule
    from atlas_megatron.mixers.delta import choose_kernel

    assert choose_kernel("chunked", torch.bfloat16, 64) is gated_delta_rule
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert choose_kernel("auto", torch.bfloat16, 64) is gated_delta_rule
    with pytest.raises(ValueError, match="delta.impl='fla' but no GPU is visible; "):
        choose_kernel("fla", torch.bfloat16, 64)


def test_the_sections_are_checked_and_belong_to_the_model(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npattern = "R-D-"\n[recurrent]\nheads = 6\n[delta]\nconv_size = 3\nimpl = "chunked"\n')
    config = load(path)
    validate(config, 1)
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load(tmp_path / "resolved.toml") == config
    other = load(path, ["recurrent.heads=4", "delta.impl=auto"])
    assert model_differences(config, other) == ["recurrent.heads: 6, the checkpoint has 4"]
    for words, world_size, said in (
        (["parallel.tensor=4"], 4, "recurrent.heads=6 does not divide by parallel.tensor=4"),
        (["parallel.tensor=8", "recurrent.heads=8"], 8, "delta.heads=4 does not divide by parallel.tensor=8"),
        (["delta.conv_size=0"], 1, "delta.conv_size=0 must be greater than 0"),
        (["recurrent.head_dim=-1"], 1, "recurrent.head_dim=-1 must be greater than 0"),
        (["delta.impl=triton"], 1, "delta.impl='triton' is unknown; choose one of auto, fla, chunked"),
    ):
        with pytest.raises(ValueError, match=said):
            validate(load(path, words), world_size)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    tiny_run.write(folder)
    return folder


SIZES = ["recurrent.heads=2", "recurrent.head_dim=8", "delta.heads=2", "delta.head_dim=8", "train.stats_every=2"]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_it_trains_learns_and_resumes(symbol: str, root: Path) -> None:
    config, run = str(root / "tiny.toml"), root / f"alone-{symbol}"
    words = [f"model.pattern={symbol}-{symbol}-", f"run.directory={run}", *SIZES]
    words += ["train.steps=40", "train.lr=1e-2", "train.validate_every=0", "checkpoint.every=36"]
    assert main([config, *words]) == 0
    whole = tiny_run.losses(run)
    assert len(whole) == 40 and all(map(math.isfinite, whole))
    assert whole[0] == pytest.approx(math.log(tiny_run.VOCABULARY), abs=0.1)
    assert whole[-1] < whole[0] - 0.5
    # The last steps again from the checkpoint before them.
    shutil.rmtree(checkpoint.folder_of(run) / "step_00000040")
    assert main([config, *words]) == 0
    assert tiny_run.losses(run) == whole


def test_two_processes_train_as_one(root: Path) -> None:
    config, words = root / "tiny.toml", [f"model.pattern={SYMBOLS}-", *SIZES]
    assert main([str(config), f"run.directory={root}/one", *words]) == 0
    layouts = {"tensor": ["parallel.tensor=2"], "sequence": ["parallel.tensor=2", "parallel.sequence=true"]}
    tiny_run.train_in(2, config, [[f"run.directory={root}/{name}", *words, *at] for name, at in layouts.items()])
    for name in layouts:
        assert tiny_run.losses(root / name) == pytest.approx(tiny_run.losses(root / "one"), abs=1e-4), name
