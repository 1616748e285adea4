"""Records: what is written, what a resumed run cuts off, what the end of a run shows, and the pictures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import Config, LogConfig, RunConfig, TrainConfig
from atlas_megatron.training import metrics


def config_in(directory: Path) -> Config:
    train = TrainConfig(steps=10, global_batch=4, log_every=2)
    return Config(run=RunConfig(directory=str(directory)), train=train, log=LogConfig(tensorboard=False))


def record(step: int) -> metrics.Record:
    speed = {"step_seconds": 0.5, "tokens_per_second": 100.0, "tflops": 0.1, "mfu": None, "eta_seconds": 5.0}
    made = {"step": step, "loss": 5.0 - 0.1 * step, "grad_norm": 1.0, "lr": 1e-3, "tokens": step * 2048, **speed}
    if step % 2 == 0:
        made["layers"] = {"1": {"alpha_mean": 0.9}, "3": {"alpha_mean": 0.7}}
        made |= {"validation_loss": 5.2 - 0.1 * step, "validation_bits_per_byte": None}
    return made


def test_bits_per_byte() -> None:
    assert metrics.bits_per_byte(8 * math.log(2), bytes_per_token=4) == pytest.approx(2.0)


@pytest.mark.parametrize(("bytes_per_token", "said"), [(None, "perplexity 148.4"), (2.5, "2.885 bits/byte")])
def test_the_progress_line_says_more_than_nats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bytes_per_token: float | None, said: str
) -> None:
    log = metrics.RunLog(config_in(tmp_path), 0, bytes_per_token)
    log.write(record(2) | {"loss": 5.0})
    log.close()
    assert f"step 2/10  loss 5.0000  {said}  grad 1.000" in capsys.readouterr().out


def test_rates_are_of_one_device() -> None:
    speed = metrics.Speed(config_in(Path("unused")), training_flops_per_token=1e9, world_size=2)
    after = speed.after(step=4, seconds=2.0, tokens=4 * 512, trained=4 * 4 * 512)
    assert after["tokens_per_second"] == 4 * 512 / 2.0 / 2
    assert after["tflops"] == pytest.approx(512 * 1e9 / 1e12)
    assert after["eta_seconds"] == pytest.approx(12.0)
    assert metrics.Speed(config_in(Path("unused")), 1e9, 2).after(10, 1.0, 2048, 20480)["eta_seconds"] == 0


def test_a_resumed_run_has_each_step_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = metrics.RunLog(config_in(tmp_path), resumed_step=0)
    for step in range(1, 7):
        log.write(record(step))
    log.close()
    with (tmp_path / metrics.METRICS).open("a") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    log = metrics.RunLog(config_in(tmp_path), resumed_step=4)
    log.write(record(5))
    log.close()
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2, 3, 4, 5]
    shown = capsys.readouterr().out.splitlines()
    # Every line of both starts is in the run's text log too, with the time.
    noted = [line.partition("  ")[2] for line in (tmp_path / metrics.TEXT).read_text().splitlines()]
    assert [line for line in noted if not line.startswith("atlas-megatron")] == shown
    assert sum(": begins after step" in line for line in noted) == 2
    assert sum("validation loss" in line for line in shown) == 3
    assert not any(line.startswith("step 3/10") for line in shown), "log_every=2 prints every second step"


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = metrics.RunLog(replace(config_in(tmp_path), log=LogConfig(tensorboard=True)), resumed_step=0)
    log.write(record(2))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "validation_loss", "layers/3/alpha_mean", "lr"} <= set(events.Tags()["scalars"])
    assert events.Scalars("loss")[0].step == 2


def test_wandb_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    wanted = replace(config_in(tmp_path), log=LogConfig(tensorboard=False, wandb="project"))
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics.RunLog(wanted, resumed_step=0)


def test_the_last_table(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, 6)]
    assert metrics.mean_measurements(records) == {"alpha_mean": pytest.approx(0.8)}
    table = metrics.summary_table(records, parameters=1234567)
    values = dict(zip(table.columns[0].cells, table.columns[1].cells, strict=True))
    assert values["parameters"] == "1,234,567"
    assert values["tokens seen"] == "10,240"
    assert values["validation loss, nats a token"] == "4.8000"
    assert values["alpha mean, mean of layers"] == "0.8"
    shortened = metrics.summary_table([{"step": 1, "loss": 1.0}], parameters=1)
    assert list(shortened.columns[1].cells)[:3] == ["1", "0", "unknown"]


def test_a_run_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_megatron.reports import runs as plot

    with pytest.raises(ValueError, match="metrics.jsonl is missing"):
        plot.plot_run(tmp_path)
    (tmp_path / metrics.METRICS).write_text("".join(json.dumps(record(step)) + "\n" for step in range(1, 81)))
    by_position = {"step": 80, "stride": 8, "loss": [5.0 - math.log1p(i) / 4 for i in range(64)]}
    (tmp_path / "position_loss.json").write_text(json.dumps(by_position))
    written = plot.plot_run(tmp_path)
    assert [path.name for path in written] == ["loss.png", "position_loss.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b"{}", b'{"step": "1", "loss": 1}', b"[" * 100_000, b"\xff\xfe"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / metrics.METRICS
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"line 2 of {file} is no record of a step .*remove that line"):
        metrics.read(tmp_path)
    # What a killed process left unfinished is no line yet.
    file.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line)
    assert [record["step"] for record in metrics.read(tmp_path)] == [1]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no record"):
        metrics.read(tmp_path)
