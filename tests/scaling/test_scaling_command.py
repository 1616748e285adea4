"""tools/scaling.py: curves that are known come out of runs made by hand; what cannot be compared is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from atlas_megatron.commands import scaling as command
from atlas_megatron.config import Config, to_toml
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.model.build import flops_per_token, num_params
from atlas_megatron.scaling import ladder, power_law
from atlas_megatron.scaling.compare import Kind, gap, kinds_of, read_runs

ROOT = Path(__file__).parents[2]
OFFSET, FACTOR, EXPONENT = 1.7, 4e3, 0.3
WIDTHS = (16, 32, 64, 128, 256)




def config_of(width: int, preset: str = "atlas") -> Config:
    config = ladder.rung("0.15M")
    memory = replace(config.memory, preset=preset, **PRESETS[preset])
    return replace(config, model=replace(config.model, hidden_size=width), memory=memory)


def made(root: Path, config: Config, *, better: float = 0.0, **changed: float) -> str:
    """A run's directory with the validation loss of a known curve."""
    tokens = config.train.steps * config.train.global_batch * config.model.seq_length
    compute = tokens * flops_per_token(config).training
    last = {"step": config.train.steps, "loss": 5.0, "tokens": tokens, "validation_bits_per_byte": None}
    last["validation_loss"] = OFFSET + FACTOR * compute**-EXPONENT - better
    directory = root / f"{config.memory.preset}_{config.model.hidden_size}"
    directory.mkdir()
    (directory / "config.toml").write_text(to_toml(config))
    lines = [json.dumps({"step": 1, "loss": 8.0, "tokens": 1}), json.dumps(last | changed)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(directory)


def test_a_known_curve_comes_back_with_its_compute(tmp_path: Path) -> None:
    runs = read_runs([made(tmp_path, config_of(width)) for width in WIDTHS])
    config = config_of(WIDTHS[0])
    flops = flops_per_token(config)
    assert runs[0].compute == runs[0].tokens * flops.training
    assert runs[0].inner == pytest.approx(flops.inner / flops.training) and runs[0].inner > 0.1
    assert runs[0].parameters == num_params(config) - 4096 * WIDTHS[0]
    (kind,) = kinds_of(runs)
    curve = kind.curve
    assert isinstance(curve, power_law.Fit)
    assert curve.offset == pytest.approx(OFFSET, abs=2e-3)
    assert curve.exponent == pytest.approx(EXPONENT, rel=2e-3)
    assert curve.factor == pytest.approx(FACTOR, rel=0.05)
    assert curve.where(float(curve.at(1e13))) == pytest.approx(1e13)
    assert curve.where(OFFSET - 0.1) is None
    # A flat curve gets there beyond any number.
    flat = power_law.fit([1e12, 1e13, 1e14], [3.0, 2.999, 2.9985])
    assert isinstance(flat, power_law.Fit) and flat.where(2.5) is None


def test_error_bars_hold_the_truth_and_shrink_with_the_noise() -> None:
    compute = numpy.geomspace(1e12, 1e16, 8)
    true = OFFSET + 2.0 * (compute / 1e12) ** -EXPONENT
    width, held = {}, 0
    for seed in range(5):
        noise = numpy.random.default_rng(seed).normal(size=8)
        for scale in (0.002, 0.01):
            curve = power_law.fit(list(compute), list(true * numpy.exp(scale * noise)))
            assert isinstance(curve, power_law.Fit)
            low, high = curve.interval("exponent")
            width.setdefault(scale, []).append(high - low)
            held += low <= EXPONENT <= high
    # 80 % bars of 10 fits.
    assert 5 <= held <= 10
    assert 3 < numpy.mean(width[0.01]) / numpy.mean(width[0.002]) < 7


def test_too_few_points_are_said() -> None:
    compute = [1e12, 4e12, 1.6e13]
    losses = [2.0 * (c / 1e12) ** -0.1 for c in compute]
    curve = power_law.fit(compute, losses)
    assert isinstance(curve, power_law.Fit)
    assert curve.offset == 0 and curve.exponent == pytest.approx(0.1)
    assert "3 points are too few for E: a power law without it" in curve.notes[0]
    assert "no fit: 2 different points are too few" in power_law.fit(compute[:2], losses[:2])
    assert "no fit: 1 different points are too few" in power_law.fit([1e12] * 3, losses)
    assert "no fit: the loss does not fall" in power_law.fit(compute, losses[::-1])
    with pytest.raises(ValueError, match="not all finite and above 0; leave out the run that diverged"):
        power_law.fit(compute, [*losses[:2], float("nan")])


def test_kinds_are_compared_at_equal_compute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made(tmp_path, config_of(width, "omeganet")) for width in WIDTHS]
    runs += [made(tmp_path, config_of(width), better=0.05) for width in WIDTHS]
    out = tmp_path / "out" / "v1.5"
    assert command.main([*runs, "--compare", "memory.preset", "--out", str(out)]) == 0
    content = json.loads((tmp_path / "out" / "v1.5.json").read_text())
    assert list(content["kinds"]) == ["omeganet", "atlas"]
    (found,) = content["gaps"]
    assert found["difference"] == pytest.approx(-0.05, abs=2e-3)
    assert found["interval"][0] < -0.04 and found["interval"][1] < 0
    # Equal compute, not equal size: the smaller of the largest runs' compute.
    largest = [max(run["compute"] for run in kind["runs"]) for kind in content["kinds"].values()]
    assert found["at"] == min(largest) != max(largest)
    assert (tmp_path / "out" / "v1.5.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "v1.5.md").read_text()
    assert "atlas against omeganet at C = " in text and "omeganet has this loss at" in capsys.readouterr().out

    assert command.main([*runs[:3], "--against", "parameters", "--out", str(out)]) == 0
    assert "N^-" in (tmp_path / "out" / "v1.5.md").read_text()


def test_kinds_without_common_compute_or_curve_say_so(tmp_path: Path) -> None:
    runs = [made(tmp_path, config_of(width)) for width in (16, 24, 32)]
    runs += [made(tmp_path, config_of(width, "omeganet")) for width in (256, 384, 512)]
    first, second = kinds_of(read_runs(runs, "memory.preset"))
    assert "they have no compute in common" in gap(first, second)
    assert "atlas has no fit: too few" in gap(Kind("atlas", first.runs[:2], "no fit: too few"), second)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("data", "tokenizer", "other/tokenizer"), ("data", "train", ("other/train",)), ("model", "seq_length", 1024)],
)
def test_other_data_is_refused_by_name(
    section: str, key: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(32)
    other = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    one, two = made(tmp_path, config_of(16)), made(tmp_path, other)
    assert command.main([one, two]) == 2
    error = capsys.readouterr().err
    assert f"{one} has {section}.{key}=" in error and f"{two} has {value!r}" in error and error.count("\n") == 1


def test_without_a_name_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = made(tmp_path, config_of(16))
    assert command.main([run, "--out", ""]) == 2
    assert "--out '.' is no name" in capsys.readouterr().err
    assert [str(path) for path in tmp_path.iterdir()] == [run]


def test_runs_that_are_no_points_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = made(tmp_path, config_of(16))
    unvalidated = made(tmp_path, config_of(32), validation_loss=None)
    begun = made(tmp_path, config_of(64), step=7)
    for words, said in (
        ([whole, unvalidated], f"{unvalidated} has no validation loss in metrics.jsonl"),
        ([whole, begun], f"{begun} is validated at step 7 of "),
        ([whole, whole + "/"], "was given twice"),
        ([str(tmp_path / "nowhere")], "config.toml is missing; give the directory of a run"),
        ([whole, "--compare", "memory.prest"], "'memory.prest' is no key of a config"),
        ([whole, "--compare", "preset"], "'preset' is no key of a config"),
    ):
        assert command.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("scaling: ") and said in error and error.count("\n") == 1
