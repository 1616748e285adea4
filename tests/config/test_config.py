"""Configuration: TOML in and out, words on the command line, what is refused and how that is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import (
    Config,
    ParallelConfig,
    cut_evenly,
    describe,
    load,
    load_saved,
    model_differences,
    to_toml,
)
from atlas_megatron.config.checks import validate
from atlas_megatron.config.differences import changed_toml
from atlas_megatron.training.resuming import changed_keys
from atlas_megatron.training.schedule import learning_rate

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A file that changes nothing."""
    path = tmp_path / "empty.toml"
    path.write_text("")
    return path


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path, empty: Path) -> None:
    config = load(empty, ['data.train=["0.7 a/b", "0.3 \\"c\\" é"]', "train.lr=3e-4", "memory.momentum=false"])
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load(path) == config
    assert config.data.train == ("0.7 a/b", '0.3 "c" é')
    assert config.memory.momentum is False


def test_words_override_the_file_and_the_last_word_wins(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text("[train]\nsteps = 7\nlr = 1\n")
    config = load(
        path, ["train.steps=8", "train.steps=9", "run.directory=runs/x y", "log.wandb=2024", "data.train=a/b"]
    )
    assert (config.train.steps, config.train.lr) == (9, 1.0)
    assert (config.run.directory, config.log.wandb, config.data.train) == ("runs/x y", "2024", ("a/b",))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("memory.theta_start=.99", 0.99),
        ("memory.theta_start=+.5", 0.5),
        ("train.lr=1.", 1.0),
        ("train.lr=1e-3", 1e-3),
        ("train.lr=.5E-3", 5e-4),
        ("train.lr=1", 1.0),
        ("train.steps=1_000", 1000),
        ("train.steps=1e3", 1000),
        ("train.steps=0100", 100),
        ("train.recompute=True", True),
        ("train.recompute=false", False),
        ("run.directory=.5", ".5"),
        ("run.directory=a\nb=1", "a\nb=1"),
    ],
)
def test_numbers_are_read_as_people_type_them(empty: Path, word: str, value: object) -> None:
    section, key = word.partition("=")[0].split(".")
    found = getattr(getattr(load(empty, [word]), section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("train.lr=inf", "train.lr=inf is not finite; give a number"),
        ("train.lr=nan", "train.lr=nan is not finite"),
        ("train.lr=1e999", "train.lr=inf is not finite"),
        ("train.lr=.", "train.lr='.' is of type str; it must be a number"),
        ("train.steps=1e30", "is too large; give a number below 2^63"),
        ("train.steps=1,000", "train.steps='1,000' is of type str; it must be a whole number"),
        (f"train.lr={10**30}", "train.lr=10000000000000000000... is too large"),
        ("run.directory=a\0b", "holds a zero byte"),
        ("train.step=3", "unknown config key 'train.step'; did you mean 'steps'? keys of [train]: steps, "),
        ("parallel.fsdp=true", "parallel.fsdp: FSDP is not built here. AdamW's states are sharded over data ranks"),
        ("train.use_megatron_fsdp=true", "Muon's by train.muon_layer_wise=true; parallel.tensor, pipeline and context"),
        ("train.optimizer_cpu_offload=true", "nothing is offloaded to the CPU. train.recompute=true, a smaller"),
        ("parallel.tp_comm_overlap=true", "parallel.sequence=true, or fewer parallel.tensor, send less (docs"),
        ("model.mtp_num_layers=1", "multi-token prediction is not built here"),
        ("trian.steps=3", "unknown config section 'trian'; did you mean 'train'?"),
        ("train.steps=few", "train.steps='few' is of type str; it must be a whole number"),
        ("train.steps=1.5", "train.steps=1.5 is of type float; it must be a whole number"),
        ("train.steps=true", "train.steps=True is of type bool; it must be a whole number"),
        ("train.recompute=1", "train.recompute=1 is of type int; it must be true or false"),
        ("data.train=[1]", "data.train=[1] must be a list of strings"),
        ("steps=3", "'steps=3' is not an override; write section.key=value"),
        ("train.steps", "'train.steps' is not an override"),
        ("memory.preset", "'memory.preset' is not an override"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(empty: Path, word: str, said: str) -> None:
    with pytest.raises(ValueError) as refused:
        load(empty, [word])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text("[train]\nstepps = 3\n")
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        load(path)
    path.write_text("train = 3\n")
    for words in ((), ("train.steps=5",)):
        with pytest.raises(ValueError, match="write it as a table"):
            load(path, words)
    path.write_text("a = " + "[" * 5000)
    with pytest.raises(ValueError, match="is not a TOML file"):
        load(path)
    path.write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert load(path).train.steps == 3
    path.write_text("[train\n")
    with pytest.raises(ValueError, match="is not a TOML file"):
        load(path)


@pytest.mark.parametrize(
    ("words", "world_size", "said"),
    [
        (["train.steps=0"], 1, "train.steps=0 must be greater than 0"),
        (["train.min_lr=1"], 1, "above train.lr"),
        (["resilience.hang_minutes=-1"], 1, "resilience.hang_minutes=-1.0 must be 0 or more"),
        (["resilience.skips_in_a_row=0"], 1, "resilience.skips_in_a_row=0 must be greater than 0"),
        (["resilience.non_finite=ignore"], 1, "resilience.non_finite='ignore' is unknown; choose one of stop, skip"),
        (["train.warmup_steps=1000"], 1, "must be less than train.steps=1000; set train.warmup_steps=250, or more"),
        (["train.steps=4"], 1, "train.warmup_steps=100 must be less than train.steps=4; set train.warmup_steps=1"),
        (["run.directory="], 1, "run.directory='' is no folder of a run's own; name one, for example runs/first"),
        (["run.directory=."], 1, "run.directory='.' is no folder"),
        (["run.directory=.."], 1, "run.directory='..' is no folder"),
        (["run.seed=-1"], 1, "run.seed=-1 is out of range; give a number from 0 to"),
        (["data.workers=-1"], 1, "data.workers=-1 must be 0"),
        (["memory.alpha_start=1.0"], 1, "memory.alpha_start=1.0 must be 0 .derived. or lie between 0 and 1"),
        (["memory.feature_map=cubic"], 1, "choose one of identity, hadamard"),
        (["memory.feature_map=taylor", "memory.head_dim=128"], 1, "to 8385 features: .* MiB .* use a smaller head_dim"),
        (["memory.feature_map=sketch"], 1, "memory.sketch_width=0 .* for example 512"),
        (["memory.write_gate=true", "memory.ns_period=16"], 1, "one token's gate would decide .*ns_step='sum'"),
        (["train.write_budget=0.1"], 1, "has no gate that keeps to it; set memory.write_gate=true"),
        (["memory.write_gate=true", "train.write_budget=-1"], 1, "train.write_budget=-1.0 must be 0 or more"),
        (["train.late_write_budget=0.5"], 1, "rises from train.write_budget=0; set that too"),
        (["memory.ns_step=mean"], 1, r"\[memory\] ns_step='mean' is unknown; choose one of last, sum"),
        (["memory.conv_size=1"], 1, "keys see no token before their own; set memory.late_keys=false"),
        (["model.pattern=G-", "delta.conv_size=1", "delta.late_keys=true"], 1, "set delta.late_keys=false"),
        (["memory.kernel=exponential"], 1, r"\[memory\] kernel='exponential' came with ns_steps=5"),
        (["memory.preset=dot", "memory.feature_map=hadamard"], 1, "that kernel lifts by itself"),
        (["memory.step_in_momentum=true"], 1, "takes gamma's place"),
        (["model.pattern=M-", "attention.persistent=4"], 1, "has no attention to see them"),
        (["attention.persistent=-1"], 1, "attention.persistent=-1 must be 0 or more"),
        (["model.pattern=F-", "train.validate_silenced=true"], 1, "has no memory to silence"),
        (["model.pattern=C-", "parallel.tensor=2", "parallel.sequence=true"], 2, "C layers, which read segment after"),
        (["memory.shard=96"], 1, r"\[memory\] shard=96 must be 0 .* or a multiple of chunk=64; nearest: 128"),
        (["memory.shard=320"], 1, r"=512 ends inside a shard of 320 tokens \(memory.shard\); nearest: 640"),
        (["memory.read=late"], 1, r"\[memory\] read='late' is unknown; choose one of token, chunk"),
        (["memory.projection=true"], 1, r'without local memories, .*=false, or memory.locals=\["16/2048"\]'),
        (['memory.locals=["16/40"]'], 1, r"memory.locals\[0\]='16/40': shard=40 must be .* multiple of chunk=16"),
        (['memory.locals=["8/64", "16/384"]'], 1, r"inside a shard of 384 tokens \(memory.locals\[1\]\); nearest: 384"),
        (['memory.locals=["16/1024"]'], 1, r"=512 ends inside a shard of 1024 tokens .*; nearest: 1024"),
        (["memory.ns_period=8", 'memory.locals=["12/48"]'], 1, r"'12/48': ns_period=8 must divide chunk=12; nearest"),
        (["memory.preset=dot", "memory.shard=64"], 1, r"\[memory\] kernel='exponential' came with shard=64"),
        (["memory.preset=dot", "memory.read=chunk"], 1, r"read='chunk'; its dual form keeps all sources"),
        (["memory.preset=dot", 'memory.locals=["16/64"]'], 1, r"memory.locals\[0\]='16/64': kernel='exponential' came"),
        (["model.pattern=C-", 'memory.locals=["16/64"]'], 1, r"memory.locals\[0\] with C layers, which .* use M or A"),
        (["model.pattern=M-C-", "memory.shard=128"], 1, "memory.shard with C layers, which read the memory of the"),
        (["parallel.context=2", "memory.shard=512"], 2, r"=2 cuts a shard of 512 tokens \(memory.shard\): each"),
        (["parallel.context=4", 'memory.locals=["16/256"]'], 4, r"a shard of 256 tokens \(memory.locals\[0\].* = 128;"),
        (
            ["parallel.context=2", 'memory.locals=["16/64"]', "data.packed=true"],
            2,
            r"data.packed=true with parallel.context=2 and memory.locals\[0\]: .* set data.packed=false, or",
        ),
        (["memory.ns_period=7"], 1, r"\[memory\] ns_period=7 must divide chunk=64; nearest that does: 8"),
        (["memory.window=1024"], 1, "memory.window=1024 is longer than model.seq_length=512"),
        (["model.seq_length=500"], 1, "nearest: 512"),
        (["model.pattern=M-X"], 1, "unknown symbols X"),
        (["model.pattern=M-|", "parallel.pipeline=2"], 2, "a stage without layers"),
        (["attention.head_dim=63"], 1, "attention.head_dim=63 is odd"),
        (["parallel.context=3"], 3, "does not divide by parallel.context=3"),
        (["parallel.sequence=true"], 1, "parallel.sequence=true with parallel.tensor=1"),
        (["parallel.tensor=3"], 4, "start a multiple of 3 processes"),
        (["parallel.tensor=8"], 8, "memory.heads=4 does not divide by parallel.tensor=8"),
        (["parallel.pipeline=2", "model.pattern=M-"], 2, "put 1 cuts"),
        (["parallel.virtual=2"], 1, "where nothing is to be interleaved"),
        (["parallel.pipeline=2", "parallel.virtual=2", "model.pattern=M-|*-"], 2, "x virtual=2 = 4; put 3 cuts"),
        (
            ["parallel.pipeline=2", "parallel.virtual=2", "model.pattern=M|-|*|-", "train.global_batch=8"],
            2,
            "micro_batch=8 x 1 .* x 2 interleaved pipeline ranks = 16; nearest: 16",
        ),
        (["train.global_batch=12", "train.micro_batch=4"], 2, "micro_batch=4 x 2 .* nearest: 16"),
        (["train.validate_sequences=12"], 1, "train.validate_sequences=12 is not a multiple"),
    ],
)
def test_contradictions_are_refused(empty: Path, words: list[str], world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(load(empty, words), world_size)


@pytest.mark.parametrize("word", ["16", "16/", "/64", "16:64", "16/64/2/2", "0/64", "16/-64", "a/b", "16.0/64", ""])
def test_other_words_for_a_local_memory_are_refused(empty: Path, word: str) -> None:
    said = r'memory.locals\[1\]=.*; write "chunk/shard" in tokens, for example "16/2048"'
    with pytest.raises(ValueError, match=said) as refused:
        validate(load(empty, [f'memory.locals=["8/64", "{word}"]']), 1)
    assert repr(word) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (["memory.shard=128", "memory.read=chunk"], 1),
        (['memory.locals=["8/64", "16/512"]', "memory.projection=true", "model.pattern=M-A-*-"], 1),
        (['memory.locals=["8/64"]', "memory.preset=delta"], 1),
        (['memory.locals=["8/128"]', "memory.shard=128", "parallel.context=4"], 4),
        (['memory.locals=["8/64"]', "data.packed=true"], 1),
        (["memory.read=chunk", "model.pattern=C-"], 1),
    ],
)
def test_hierarchies_that_fit_are_taken(empty: Path, tmp_path: Path, words: list[str], world_size: int) -> None:
    config = load(empty, words)
    validate(config, world_size)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load(tmp_path / "again.toml") == config


def test_every_field_is_explained() -> None:
    text = describe()
    for section, values in vars(Config()).items():
        assert f"[{section}]" in text
        for key in vars(values):
            assert f"  {key}: " in text


def test_a_saved_configuration_of_before_is_the_model_that_it_was(tmp_path: Path, empty: Path) -> None:
    """A checkpoint lists all keys of its time. Keys that came later mean what was done then."""
    later = ("ns_step", "write_gate", "write_budget", "open_gate", "copy_start", "shard", "read", "locals", "project")
    later = (*later, "residual", "eta_per_token")
    saved = to_toml(load(empty, ["memory.preset=atlas", "memory.norm=layer", "memory.ns_period=16"]))
    kept = [line for line in saved.splitlines() if not line.startswith(later)]
    (tmp_path / "config.toml").write_text("\n".join(kept))
    before = load_saved(tmp_path / "config.toml")
    assert (before.memory.open_gate, before.memory.copy_start) == (False, False)
    assert before.memory.residual and before.memory.eta_per_token == 0.01  # where the preset says otherwise
    assert load(tmp_path / "config.toml").memory.open_gate
    assert load(tmp_path / "config.toml").memory.eta_per_token == 0.005
    assert (before.memory.ns_step, before.memory.write_gate, before.train.write_budget) == ("last", False, 0.0)
    assert (before.memory.shard, before.memory.read, before.memory.locals) == (0, "token", ())
    assert (before.memory.norm, before.memory.preset) == ("layer", "atlas")


def test_the_screen_shows_what_differs_from_the_defaults(tmp_path: Path, empty: Path) -> None:
    words = ["train.lr=3e-4", "memory.preset=omeganet", "memory.window=8", 'data.train=["a"]', "train.log_every=1"]
    config = load(empty, words)
    said = changed_toml(config)
    assert said.splitlines() == [
        "[run]", 'directory = "runs/atlas"', "", "[memory]", 'preset = "omeganet"', "window = 8", "", "[train]",
        "lr = 0.0003", "", "[data]", 'train = ["a"]',
    ]  # fmt: skip
    (tmp_path / "changed.toml").write_text(said)
    assert load(tmp_path / "changed.toml") == config


def test_a_run_that_goes_on_with_other_keys_says_which_and_what_follows(empty: Path) -> None:
    before = load(empty, ["train.steps=10", "train.warmup_steps=2", "train.lr=1e-3", "train.min_lr=1e-4"])
    same = replace(before, run=replace(before.run, directory="elsewhere"), parallel=ParallelConfig(tensor=2))
    assert changed_keys(same, before, 10) == ""
    longer = replace(before, train=replace(before.train, steps=40))
    said = changed_keys(longer, before, 10)
    assert said.startswith("these keys differ from the run's: train.steps=40 (was 10); they hold from step 11 on,")
    assert said.endswith(f"the learning rate goes from 1.00e-04 to {learning_rate(longer.train, 11):.2e}")
    other = replace(before, train=replace(before.train, lr=2e-3))
    assert "train.lr=0.002 (was 0.001); it is done, and nothing is trained with them" in changed_keys(other, before, 10)
    clipped = replace(before, train=replace(before.train, clip_grad=0.5))
    assert changed_keys(clipped, before, 4).endswith("train.clip_grad=0.5 (was 1.0); they hold from step 5 on")
    # Weights from elsewhere are no run that goes on.
    assert changed_keys(other, before, 0) == ""


def test_another_model_is_told_by_its_fields(empty: Path) -> None:
    ours = load(empty)
    same = load(empty, ["memory.impl=reference", "model.pattern=M-M-|*-M-", "parallel.pipeline=2", "train.lr=1e-4"])
    assert model_differences(ours, same) == []
    keys = ['memory.locals=["8/64"]', "memory.projection=true", "memory.shard=128", "memory.read=chunk"]
    hierarchy = load(empty, keys)
    assert model_differences(hierarchy, ours) == [
        "memory.shard: 128, the checkpoint has 0",
        "memory.read: 'chunk', the checkpoint has 'token'",
        "memory.locals: ('8/64',), the checkpoint has ()",
        "memory.projection: True, the checkpoint has False",
    ]
    other = load(empty, ["memory.window=8", "model.hidden_size=128"])
    assert model_differences(ours, other) == [
        "model.hidden_size: 256, the checkpoint has 128",
        "memory.window: 16, the checkpoint has 8",
    ]


@pytest.mark.parametrize(("name", "size"), [("atlas-170m", 170e6), ("atlas-340m", 340e6)])
def test_the_papers_sizes(name: str, size: float) -> None:
    from atlas_megatron.model.build import num_params

    config = load(CONFIGS / f"{name}.toml")
    validate(config, 8)
    assert abs(num_params(config) / size - 1) < 0.05
    assert config.train.global_batch * config.model.seq_length == 2**19


def test_the_quickstart_is_the_whole_model() -> None:
    config = load(CONFIGS / "quickstart.toml")
    validate(config, 1)
    memory = config.memory
    assert (memory.network, memory.norm, memory.window, memory.omega_gates) == ("mlp", "none", 16, "pair")
    assert (memory.momentum, memory.ns_steps, memory.feature_map, memory.degree) == (True, 5, "hadamard", 2)
    assert config.model.pattern.count("*") == 1


@pytest.mark.parametrize(
    ("pattern", "stages", "cut"),
    [
        ("M-*-M-A-", 2, "M-*-|M-A-"),
        ("M-*-M-", 2, "M-*-|M-"),
        ("M-M-M-M-M-", 3, "M-M-|M-|M-M-"),
        ("MM*-", 3, "M|M|*-"),
        ("M-|*-M-", 2, "M-|*-M-"),
        ("M-", 2, "M-"),
        ("M-M-", 1, "M-M-"),
    ],
)
def test_a_pattern_without_cuts_is_cut_evenly(empty: Path, pattern: str, stages: int, cut: str) -> None:
    assert cut_evenly(pattern, stages) == cut
    config = load(empty, [f"model.pattern={pattern}", f"parallel.pipeline={stages}"])
    assert config.model.pattern == cut


def test_a_key_is_read_under_its_former_name(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[memory]\nmemory = "gated_mlp"\n')
    assert load(file).memory.network == "gated_mlp"
    assert load(file, ["memory.memory=linear"]).memory.network == "linear"
    assert "network = " in to_toml(load(file))
    file.write_text('[memory]\nmemory = "linear"\nnetwork = "mlp"\n')
    with pytest.raises(ValueError, match="memory.memory is the former name of memory.network"):
        load(file)
