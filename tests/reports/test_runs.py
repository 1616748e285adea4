"""What the pictures of a run say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from matplotlib import pyplot

from atlas_megatron.commands import plot as command
from atlas_megatron.reports import runs as plot


def test_the_loss_along_the_context_is_that_of_the_context_alone() -> None:
    """Whatever its tokens cost, and however much the first of them lack a context."""
    stride, cuts = 8, 6
    tokens = numpy.random.default_rng(0).normal(5, 1, stride)
    context = numpy.where(numpy.arange(stride * cuts) < 5, 0.8, 0.0)
    figure, axes = pyplot.subplots()
    plot._draw_positions(axes, numpy.tile(tokens, cuts) + context, stride)
    line, means = axes.get_lines()
    numpy.testing.assert_allclose(line.get_ydata(), context + tokens.mean())
    assert means.get_ydata()[0] > means.get_ydata()[-1]
    pyplot.close(figure)


def records(steps: int, bits: float | None, **more: object) -> list[dict[str, object]]:
    """Of a run whose nats are so many bits per byte; None: without validation."""
    made: list[dict[str, object]] = [
        {"step": step, "loss": 5.0 - step / steps, "tokens": 768 * step, **more} for step in range(1, steps + 1)
    ]
    if bits is not None:
        made[-1] |= {"validation_loss": 4.0, "validation_bits_per_byte": 4.0 * bits}
    return made


def test_a_short_run_has_a_smoothed_line_and_a_unit_that_can_be_read() -> None:
    figure, axes = pyplot.subplots()
    plot._draw_loss(axes, records(12, 0.5))
    assert [line.get_label() for line in axes.get_lines()] == ["each training step", "mean of 4 steps", "validation"]
    assert axes.get_xlabel() == "tokens seen (thousands)"
    assert axes.xaxis.get_major_formatter()(0.002, None) == "2"
    pyplot.close(figure)
    assert [plot._tokens_in(most)[1] for most in (900, 2e6, 3e10)] == [
        "tokens seen", "tokens seen (millions)", "tokens seen (billions)",
    ]  # fmt: skip


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte() -> None:
    same = plot._panels({"a": records(9, 0.5), "b": records(9, 0.5)})
    assert {title: unit for title, (unit, _) in same.items()} == {
        "training loss, smoothed": "nats per token",
        "validation loss": "nats per token",
        "validation bits per byte": "bits per byte",
    }
    other = plot._panels({"a": records(9, 0.5), "b": records(9, 0.4)})
    assert {unit for unit, _ in other.values()} == {"bits per byte"} and "validation loss" not in other
    figure, axes = pyplot.subplots()
    other["training loss, smoothed"][1](axes, records(5, 0.4), "C0", "b")
    assert axes.get_lines()[0].get_ydata() == pytest.approx([0.4 * 4.4])
    pyplot.close(figure)
    with pytest.raises(ValueError, match="different tokenizers, and c has no validation in bits per byte; leave it"):
        plot._panels({"a": records(9, 0.5), "b": records(9, 0.4), "c": records(9, None)})


def test_a_comparison_has_no_empty_panel(tmp_path: Path) -> None:
    for name, layers in (("a", {}), ("b", {"layers": {"1": {"memory_share": 0.4}}})):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records(9, 0.5, **layers))
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    assert len(plot._panels({"a": records(9, None)})) == 1
    assert plot.compare_runs([tmp_path / "a", tmp_path / "b"]).read_bytes().startswith(b"\x89PNG")


def write_run(folder: Path, made: list[dict[str, object]], positions: str = "") -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in made))
    if positions:
        (folder / "position_loss.json").write_text(positions)
    return folder


@pytest.mark.parametrize(
    ("out", "said"),
    [("", "'.' is no picture's name"), ("x.zzz", "let it end with one of"), ("x", "is no picture's name"),
     ("folder.png", "is no file that can be replaced"), ("a/x.png", "")],
)  # fmt: skip
def test_what_a_comparison_cannot_be_called_is_said_before_anything_is_drawn(
    out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    runs = [str(write_run(tmp_path / name, records(3, None))) for name in ("a", "b")]
    before = sorted(tmp_path.rglob("*"))
    assert command.main([*runs, "--out", out]) == (2 if said else 0)
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == bool(said)
    assert (sorted(tmp_path.rglob("*")) == before) == bool(said)


def test_a_picture_is_whole_or_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "a", records(3, None))
    (run / "loss.png").write_bytes(b"before")

    def torn(self: object, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", torn)
    assert command.main([str(run)]) == 2
    assert (run / "loss.png").read_bytes() == b"before" and len(list(run.iterdir())) == 2


@pytest.mark.parametrize(
    "positions",
    ["", "{}", "[1]", '{"loss": [], "stride": 0, "step": 1}', '{"loss": "x", "stride": 1, "step": 1}', "[" * 99999,
     '{"loss": [1, [2]], "stride": 1, "step": 1}', '{"loss": [1], "stride": 2, "step": 1}'],
    ids=range(8),
)  # fmt: skip
def test_a_broken_loss_by_position_is_named(
    positions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", records(3, None))
    (run / "position_loss.json").write_text(positions)
    assert command.main([str(run)]) == 2
    said = capsys.readouterr().err
    assert f"{run}/position_loss.json is no loss by position" in said and said.count("\n") == 1


@pytest.mark.parametrize("wrong", [{"tokens": "many"}, {"loss": None}, {"tokens": [1]}])
def test_a_record_that_cannot_be_drawn_is_named(
    wrong: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", [*records(3, None), {"step": 4, "loss": 1.0, "tokens": 9} | wrong])
    assert command.main([str(run)]) == 2
    assert "step 4 of" in capsys.readouterr().err


def test_a_run_of_any_name_is_drawn(tmp_path: Path) -> None:
    """No mathematics, no second line, and not left out of the legend."""
    runs = [write_run(tmp_path / name, records(3, None)) for name in (r"a$\x$", "_b", "two\nlines")]
    out = plot.compare_runs(runs)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [plot.plain(run.name) for run in runs] == [r"a\$\x\$", " _b", "two lines"]
    for run in runs:
        plot.plot_run(run)
