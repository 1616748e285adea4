"""Diagnostics of a run: gate histograms, spectra around Newton-Schulz, silenced memories, warnings, pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_kernels import Gates
from atlas_kernels.layer_start import ETA_HEADROOM, eta_start, gate_widths
from atlas_megatron.commands import plot as command
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers import hybrid
from atlas_megatron.mixers.base import Mode, in_mode
from atlas_megatron.mixers.memory import HISTOGRAM_BINS, counts, singular_values
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from tests.support import tiny_run
from tests.support.single_mixer import build_mixer
from tests.support.small_model import SMALL

MEMORIES = {
    **{name: replace(SMALL.memory, **PRESETS[name]) for name in PRESETS},
    "source gates": replace(SMALL.memory, omega_gates="source"),
    "taylor": replace(SMALL.memory, feature_map="taylor", head_dim=4),
    "softmax": replace(SMALL.memory, **PRESETS["swdt"] | {"kernel": "softmax"}),
}


def test_counts_are_a_histogram() -> None:
    values = torch.rand(4, 1000, generator=torch.Generator().manual_seed(1)) * 0.3
    values[0, :3] = torch.tensor([0.0, 0.3, 0.15])
    found = counts(values, 0.3)
    assert found.dtype == torch.int64 and found.sum() == 4000
    assert torch.equal(found.float(), torch.histc(values, HISTOGRAM_BINS, 0, 0.3))
    assert counts(torch.full((5,), torch.nan), 1.0).sum() == 5


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_every_learned_gate_is_counted(memory: Any) -> None:
    mixer, x = build_mixer("M", replace(SMALL, memory=memory)), torch.randn(24, 2, 32)
    mixer.mode = Mode(measure=True)
    with torch.no_grad():
        mixer.gate_bias.uniform_(-3, 3)
        mixer(x)
        nothing = torch.zeros(2, 24, memory.heads, memory.head_dim)  # a write gate would see keys and values
        gates = vars(mixer._gates(x, nothing, nothing)[0])
    found = {name: value for name, value in mixer.measurements.items() if name.endswith("_histogram")}
    assert found.keys() == {f"{name}_histogram" for name in gate_widths(memory)}
    for name in gate_widths(memory):
        gate = gates["gamma" if memory.step_in_momentum and name == "eta" else name]
        top = ETA_HEADROOM * eta_start(memory) if name == "eta" else 1.0
        assert found[f"{name}_histogram"].sum() == gate.numel()
        assert torch.equal(found[f"{name}_histogram"].float(), torch.histc(gate, HISTOGRAM_BINS, 0, top))
    assert ("momentum_spectrum" in mixer.measurements) == (memory.ns_steps > 0)


@pytest.mark.usefixtures("single_process_megatron")
def test_spectra_of_known_matrices() -> None:
    mixer = build_mixer("M", SMALL)
    values = torch.linspace(0.5, 4.0, 8)
    left, right = (torch.linalg.qr(torch.randn(1, 4, n, 8)).Q for n in (8, 12))
    momentum = left @ torch.diag(values) @ right.mT  # [1, H, 8, 12]
    found = mixer._spectra((momentum, 7 * momentum.mT))
    at = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    both = torch.cat([values, values])
    expected = (both / both.square().mean().sqrt()).quantile(at)
    torch.testing.assert_close(found["momentum_spectrum"], expected, rtol=1e-4, atol=1e-4)
    # On singular values, Newton-Schulz is a polynomial of each.
    after = both / values.norm()
    for _ in range(SMALL.memory.ns_steps):
        after = 3.4445 * after - 4.7750 * after**3 + 2.0315 * after**5
    torch.testing.assert_close(found["orthogonalised_spectrum"], after.quantile(at), rtol=1e-3, atol=1e-3)


def test_singular_values_of_what_is_not_finite_are_nan() -> None:
    matrices = torch.eye(3).repeat(2, 1, 1)
    matrices[1, 0, 2] = torch.inf
    found = singular_values(matrices)
    assert torch.equal(found[0], torch.ones(3)) and found[1].isnan().all()


def holding(gates: Gates) -> Gates:
    """No step, no decay."""
    return replace(gates, alpha=torch.ones_like(gates.alpha), eta=torch.zeros_like(gates.eta))


@pytest.mark.parametrize("symbol", ["M", "A", "C"])
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
@pytest.mark.usefixtures("single_process_megatron")
def test_a_silent_memory_neither_steps_nor_decays(memory: Any, symbol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = replace(SMALL.attention, segment=8)
    mixer = build_mixer(symbol, replace(SMALL, memory=memory, attention=attention))
    atlas = mixer if symbol == "M" else mixer.memory
    x, context = torch.randn(24, 2, 32), StreamContext()
    with torch.no_grad():
        spoken = mixer(x)[0]
        with in_mode(mixer, ablate=True):
            silent = mixer(x)[0]
            pieces = torch.cat([mixer(piece, context)[0] for piece in x.split([5, 16, 3])])
        assert torch.equal(mixer(x)[0], spoken)
        own = atlas._gates
        monkeypatch.setattr(atlas, "_gates", lambda *given: (holding(own(*given)[0]), ()))
        torch.testing.assert_close(silent, mixer(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(silent, pieces, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(silent, spoken, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("single_process_megatron")
def test_a_silent_memory_reads_its_start_weights_also_in_packed_documents() -> None:
    mixer, x = build_mixer("M", SMALL), torch.randn(16, 2, 32)
    positions = torch.arange(16).repeat(2, 1)
    positions[1, 6:] -= 6
    asked: list[Tensor] = []
    read = mixer.read
    with torch.no_grad():
        _, learned = mixer.mix(x, None)
        mixer.read = lambda q, state: asked.append(q) or read(q, state)
        with in_mode(mixer, ablate=True):
            silent, after = mixer.mix(x, None, positions)
            assert after.memory is None
            torch.testing.assert_close(read(asked[0], learned), read(asked[0], None), rtol=0, atol=0)
        own = mixer._gates
        mixer._gates = lambda *given: (holding(own(*given)[0]), ())
        torch.testing.assert_close(silent, mixer.mix(x, None, positions)[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diagnostics")
    tiny_run.write(folder, "M-A-")
    for name, words in {
        "silenced": ["train.validate_silenced=true", "log.tensorboard=true"],
        "plain": [],
        "attention": ["model.pattern=*-"],
    }.items():
        assert main([str(folder / "tiny.toml"), f"run.directory={folder}/{name}", *words]) == 0
    return folder


def test_validation_with_silenced_memories_changes_nothing_else(root: Path) -> None:
    silenced, plain = metrics.read(root / "silenced"), metrics.read(root / "plain")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in silenced] == [r[key] for r in plain]
    assert [r.get("validation_loss") for r in silenced] == [r.get("validation_loss") for r in plain]
    assert [r["step"] for r in silenced if "validation_loss_silenced" in r] == [3, 6]
    assert silenced[-1]["validation_loss_silenced"] != silenced[-1]["validation_loss"]
    # Nothing to silence, or not asked to.
    for records in (plain, metrics.read(root / "attention")):
        assert not any("validation_loss_silenced" in r for r in records)


def test_the_last_lines_say_what_the_memory_contributes(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = metrics.read(root / "silenced")
    last = records[-1] | {"validation_loss": 5.0, "validation_loss_silenced": 5.12}
    table = metrics.summary_table([*records, last], parameters=1)
    values = dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert values["validation loss with the memory ablated, change in nats"] == "+0.1200"
    assert not any("histogram" in name or "spectrum" in name for name in values)
    words = [str(root / "tiny.toml"), f"run.directory={root}/line", "train.steps=1", "train.warmup_steps=0"]
    assert main([*words, "train.validate_silenced=true"]) == 0
    rise = metrics.silenced_difference(metrics.read(root / "line")[-1])
    assert f"bits per byte  memory ablated: {rise:+.2f} nats" in capsys.readouterr().out


def test_records_hold_lists_and_tensorboard_histograms(root: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layer = metrics.read(root / "silenced")[-1]["layers"]["3"]
    gates = 2 * 32 * 2  # sequences of a micro-batch, tokens, heads
    assert [sum(layer[f"{name}_histogram"]) for name in ("alpha", "eta", "theta")] == [gates] * 3
    assert sum(layer["gamma_histogram"]) == 4 * gates
    events = EventAccumulator(str(root / "silenced" / "tensorboard"))
    events.Reload()
    told = events.Histograms("layers/3/eta")[-1].histogram_value
    assert told.num == gates and sum(told.bucket) == gates
    assert told.max == pytest.approx(ETA_HEADROOM * 0.04)
    assert told.sum / told.num == pytest.approx(layer["eta_mean"], abs=told.max / HISTOGRAM_BINS)
    assert events.Scalars("layers/3/momentum_spectrum/median")[-1].value == pytest.approx(layer["momentum_spectrum"][2])


def test_counts_of_two_processes_are_summed(root: Path) -> None:
    words = ["train.steps=1", "train.warmup_steps=0", "train.validate_every=0"]
    layouts = {"tensor": ["parallel.tensor=2"], "data": []}
    config = root / "tiny.toml"
    tiny_run.train_in(2, config, [[f"run.directory={root}/{name}", *words, *at] for name, at in layouts.items()])
    alone = metrics.read(root / "plain")[0]["layers"]["1"]
    for name, factor in (("tensor", 1), ("data", 2)):
        layer = metrics.read(root / name)[0]["layers"]["1"]
        assert sum(layer["gamma_histogram"]) == factor * sum(alone["gamma_histogram"])
        assert len(layer["momentum_spectrum"]) == 5
        assert layer["alpha_mean"] == pytest.approx(alone["alpha_mean"], rel=1e-3)


def test_a_collapsed_memory_is_said_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def collapsed(self: Any, attention: Tensor, gate: Tensor) -> None:
        self.measurements = {"memory_share": torch.tensor(0.007)}

    monkeypatch.setattr(hybrid._Joined, "_measure", collapsed)
    words = ["train.steps=2", "train.warmup_steps=0", "train.validate_every=0"]
    assert main([str(root / "tiny.toml"), f"run.directory={root}/collapsed", *words]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(said) == 1
    assert said[0].startswith("warning: step 1: the memory carries 0.7% of what varies in the output of layer 3 (mem")


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from atlas_megatron.reports import runs as plot

    return plot


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_pictures_of_one_run(root: Path, plot: ModuleType) -> None:
    drawn = plot.plot_run(root / "silenced")
    assert [path.name for path in drawn] == ["loss.png", "position_loss.png", "diagnostics.png"]
    assert all(map(is_picture, drawn))
    without = plot.plot_run(root / "attention")
    assert [path.name for path in without] == ["loss.png", "position_loss.png"]
    assert all(map(is_picture, without))


def test_panels_are_those_that_were_measured(root: Path, plot: ModuleType) -> None:
    from atlas_megatron.reports import diagnostics as plot_diagnostics

    records = metrics.read(root / "silenced")
    with_share = [axes.get_title() for axes in plot_diagnostics.figure(records, "run").axes]
    assert "memory share of the output" in with_share and "gamma: values" in with_share
    only = [r | {"layers": {"1": r["layers"]["1"]}} for r in records if "layers" in r]
    assert [axes.get_title() for axes in plot_diagnostics.figure(only, "run").axes if axes.get_title()] == [
        title for title in with_share if title != "memory share of the output"
    ]
    assert plot_diagnostics.figure(metrics.read(root / "attention"), "run") is None


def test_runs_are_compared(root: Path, tmp_path: Path, plot: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(root / name) for name in ("silenced", "plain", "attention")]
    assert command.main(runs) == 0
    assert str(root / "silenced" / "compare.png") in capsys.readouterr().out
    assert is_picture(root / "silenced" / "compare.png")
    assert command.main([*runs[1:], "--out", f"{tmp_path}/new/both.png"]) == 0
    assert is_picture(tmp_path / "new" / "both.png")
    assert is_picture(plot.compare_runs([root / "attention", root / "attention"], tmp_path / "same.png"))
    capsys.readouterr()
    assert command.main([runs[0], "--out", "one.png"]) == 2
    assert "one run was given" in capsys.readouterr().err
