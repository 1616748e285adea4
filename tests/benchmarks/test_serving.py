"""benchmarks.serving: its requests, an attention model of equal size, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_megatron.hf.configuration_atlas import AtlasConfig
from benchmarks import serving
from benchmarks.serving_requests import Job, measured

SMALL = {"hidden_size": 32, "ffn_hidden_size": 48, "vocab_size": 64, "seq_length": 32}


def test_a_session_of_a_memory_is_flat_and_one_of_attention_is_not() -> None:
    sizes = {"heads": 2, "head_dim": 8, "window": 8}
    config = AtlasConfig(pattern="M-*-", memory={"heads": 2, "head_dim": 8, "preset": ""}, attention=sizes, **SMALL)
    like = serving.attention_like(config)
    assert like.pattern == "F-F-" and like.hidden_size == config.hidden_size
    assert serving.row_bytes(config, 16) == serving.row_bytes(config, 64)
    # Keys and values of both layers, in float32.
    assert serving.row_bytes(like, 64) == 2 * 2 * 64 * 16 * 4


def test_every_way_is_asked_the_same() -> None:
    job = Job(**serving.job_of(64, 3, (9,)))
    assert job == Job(**serving.job_of(64, 3, (9,)))
    assert len({len(prompt) for prompt in job.prompts}) > 4 and max(job.at_once) == len(job.prompts)
    asked: list[tuple[int, int]] = []
    found = measured(lambda prompts, new: asked.append((len(prompts), new)), job)
    assert asked == [(2, 2), (1, 3), (8, 3), (32, 3), (1, 1)] and len(job.long(5000)) == 5000
    assert set(found) == {"tokens_per_second", "first_token_seconds"}


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving.main([str(tmp_path)]) == 2
    assert "is no exported model" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert serving.main([str(tmp_path), "--vllm", "missing"]) == 2
    assert "make one that has vLLM with: make setup-vllm" in capsys.readouterr().err
