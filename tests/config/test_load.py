"""A run is a YAML file plus overrides; whatever is wrong with it is said in the user's words, all of it at once."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from megatron_hybrid.config import ConfigError, RunConfig, dump_config, load_config
from megatron_hybrid.config.load import apply_override, load_model, preset_names

RUN = """\
run_dir: runs/one
model: hybrid-cpu-12m
data:
  sources: {web: corpus/web}
  sequence_length: 512
optimizer: {lr: 1e-4}
train: {steps: 100, global_batch_size: 8}
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def problems(source: str | Path, *overrides: str) -> list[str]:
    """The lines of the error after its heading."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith("cannot use ") and heading.endswith(":")
    return [line.strip() for line in lines]


def test_a_file_gives_a_run(run_file: Path) -> None:
    config = load_config(run_file)
    assert (config.run_dir, config.optimizer.lr, config.train.steps) == (Path("runs/one"), 1e-4, 100)
    assert config.model.hidden_size == 320
    assert config.parallel.tensor == 1


def test_overrides_reach_every_depth(run_file: Path) -> None:
    config = load_config(
        run_file,
        [
            "train.steps=7",
            "optimizer.lr=3e-3",
            "parallel.pipeline=2",
            "parallel.stages=[5, 7]",
            "data.sources.code=corpus/code",
            "data.phases=[{blend: {web: 3, code: 1}}, {start: 60%, blend: {code: 1}}]",
            "data.tokenizer.path=tokenizer.model",
            "train.global_batch_size=4",
            "train.global_batch_size=16",
            "checkpoint.keep_last=null",
        ],
    )
    assert (config.train.steps, config.optimizer.lr, config.parallel.stages) == (7, 3e-3, (5, 7))
    assert config.data.sources == {"web": Path("corpus/web"), "code": Path("corpus/code")}
    assert [phase.start for phase in config.data.phases] == ["0%", "60%"]
    assert config.data.tokenizer is not None and config.data.tokenizer.path == Path("tokenizer.model")
    assert config.train.global_batch_size == 16
    assert config.checkpoint.keep_last is None


def test_an_override_fills_a_section_left_empty(run_file: Path) -> None:
    run_file.write_text(RUN + "logging:\n")
    assert load_config(run_file, ["logging.every_steps=5"]).logging.every_steps == 5


@pytest.mark.parametrize(
    "model", ["{preset: hybrid-cpu-12m, ffn_hidden_size: 640}", "{ffn_hidden_size: 640, preset: hybrid-cpu-12m}"], ids=["before", "after"]
)
def test_keys_beside_a_preset_override_it(run_file: Path, model: str) -> None:
    run_file.write_text(RUN.replace("model: hybrid-cpu-12m", f"model: {model}"))
    config = load_config(run_file)
    assert (config.model.hidden_size, config.model.ffn_hidden_size) == (320, 640)


def test_overrides_change_a_preset_or_replace_it(run_file: Path) -> None:
    assert load_config(run_file, ["model.ffn_hidden_size=640"]).model.ffn_hidden_size == 640
    assert load_config(run_file, ["model=hybrid-1b", "model.vocab_size=5000"]).model.vocab_size == 5000
    assert load_config(run_file, ["model.preset=hybrid-1b"]).model.hidden_size == 2048


def test_a_dump_reads_back_equal_and_whole(run_file: Path, tmp_path: Path) -> None:
    config = load_config(
        run_file, ["data.sources.no='1e5'", "parallel.pipeline=2", "parallel.stages=[5, 7]", "schedule.warmup_tokens=100K"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert dump_config(load_config(again)) == dump_config(config)
    assert load_config(again).model_fields_set == set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("parallel.tensr=2", "unknown option 'parallel.tensr'; did you mean 'parallel.tensor'?"),
        ("tran.steps=2", "unknown option 'tran'; did you mean 'train'?"),
        ("data.phases=[{strt: 0}]", "unknown option 'data.phases.0.strt'; did you mean 'data.phases.0.start'?"),
        ("data.tokenizer={path: x, kin: y}", "unknown option 'data.tokenizer.kin'; did you mean 'data.tokenizer.kind'?"),
        ("min_lr=1", "unknown option 'min_lr'; did you mean 'optimizer.min_lr'?"),
        (
            "every_steps=1",
            "unknown option 'every_steps'; did you mean 'validation.every_steps' or 'checkpoint.every_steps' or 'logging.every_steps'?",
        ),
        ("xyzzy=1", "unknown option 'xyzzy'"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(run_file: Path, override: str, problem: str) -> None:
    assert problems(run_file, override) == [problem]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps=two", 'train.steps: expected a whole number, got "two"'),
        ("train.steps=1.5", "train.steps: expected a whole number, got 1.5"),
        ("train.steps=0", "train.steps: expected a number above 0, got 0"),
        ("optimizer.lr=", "optimizer.lr: expected a number, got null"),
        ("optimizer.beta1=1", "optimizer.beta1: expected a number below 1.0, got 1"),
        ("optimizer.min_lr=-1", "optimizer.min_lr: expected a number not below 0.0, got -1"),
        ("schedule.kind=step", "schedule.kind: expected 'cosine', 'wsd' or 'constant', got \"step\""),
        ("checkpoint.resume=perhaps", 'checkpoint.resume: expected true or false, got "perhaps"'),
        ("run_dir=5", "run_dir: expected a path, got 5"),
        ("model.pattern=[M]", 'model.pattern: expected text, got ["M"]'),
        ("data.sources=web", 'data.sources: expected a mapping, got "web"'),
        ("data.sources={}", "data.sources: expected at least 1 of them, got {}"),
        ("data.phases=3", "data.phases: expected a list, got 3"),
        ("data.phases=[{start: 150%}]", "data.phases.0.start: '150%' lies outside a run of 100 tokens; "),
        ("parallel.stages=[1, x]", 'parallel.stages.1: expected a whole number, got "x"'),
        ("parallel=2", "parallel: expected a group of options, got 2"),
        ("schedule.warmup_tokens=many", "schedule.warmup_tokens: expected a number such as 4096 or '8.3B', got 'many'"),
        ("model.pattern=MXM", "model: layer pattern has 'X' at position 2 of 3; "),
        ("parallel.sequence_parallel=true", "parallel: sequence_parallel=true needs tensor above 1, got tensor=1; "),
        ("parallel.tensor=3", "model.ffn_hidden_size=1280 does not divide by parallel.tensor=3; change one of them"),
        ("parallel.pipeline=13", "parallel.pipeline=13 x parallel.virtual_pipeline=1 asks for 13 stages, but the model has only 12 "),
        ("parallel.stages=[5]", "parallel.stages=[5] covers 5 layers, but the model has 12"),
        ("model=hybrid-2b", "model.preset: no preset is called 'hybrid-2b'; did you mean 'hybrid-1b'? (presets: hybrid-1b, "),
        ("model.preset=[1]", "model.preset: no preset is called [1]"),
        ("model=3", "model: expected a group of options, got 3"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(run_file: Path, override: str, problem: str) -> None:
    (line,) = problems(run_file, override)
    assert line.startswith(problem)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps", "expected NAME=VALUE, such as parallel.tensor=2"),
        ("=3", "expected NAME=VALUE, such as parallel.tensor=2"),
        ("train..steps=3", "expected NAME=VALUE, such as parallel.tensor=2"),
        ("train.steps.x=3", "'train.steps' holds 100 and has no options below it"),
        ("model.pattern=*-", "the value is not valid YAML; if it is meant as text, quote it: model.pattern='\"*-\"'"),
    ],
)
def test_a_malformed_override_is_refused(run_file: Path, override: str, problem: str) -> None:
    assert problems(run_file, override) == [problem]


@pytest.mark.parametrize("part", ["1", "-1", "start"])
def test_an_item_that_a_list_does_not_have(run_file: Path, part: str) -> None:
    (line,) = problems(run_file, "data.phases=[{start: 0}]", f"data.phases.{part}.start=1")
    assert line == f"'data.phases' is a list: expected a number from 0 to 0, got {part!r}; or give it as a whole: data.phases=[...]"


def test_items_of_lists_are_overridden_by_number() -> None:
    tree = {"stages": [{"steps": 1}, {"steps": 2, "sides": [3, 4]}]}
    for override in ("stages.1.steps=5", "stages.1.sides.0=6", "stages.0.rate.high=7"):
        apply_override(tree, override)
    assert tree == {"stages": [{"steps": 1, "rate": {"high": 7}}, {"steps": 5, "sides": [6, 4]}]}


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {preset: hybrid-cpu-12m, hiden_size: 3}\nparallel: {tensor: 0}\noptimizer: {}\ntrain: {steps: x}\n")
    assert sorted(problems(path)) == sorted(
        [
            "missing option 'run_dir': Where the run keeps its resolved configuration, metrics, checkpoints and pictures.",
            "unknown option 'model.hiden_size'; did you mean 'model.hidden_size'?",
            "parallel.tensor: expected a number above 0, got 0",
            "missing option 'data': What the model reads.",
            "missing option 'optimizer.lr': Peak learning rate.",
            'train.steps: expected a whole number, got "x"',
            "missing option 'train.global_batch_size': Samples per optimizer step over all ranks.",
        ]
    )


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path / "none.yaml") == ["No such file or directory; expected a YAML file"]
    assert problems(tmp_path) == ["Is a directory; expected a YAML file"]
    binary, empty, scalar = tmp_path / "binary.yaml", tmp_path / "empty.yaml", tmp_path / "scalar.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    empty.write_text("# nothing\n")
    scalar.write_text("- a list\n")
    assert problems(binary)[0].startswith("not text in UTF-8")
    assert problems(empty) == problems(scalar) == ["expected a mapping of options such as 'train:'"]


def test_the_error_crosses_processes(run_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file, ["train.steps=0"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_load_model_takes_a_preset_or_a_run(run_file: Path) -> None:
    model, parallel, sequence_length = load_model("nemotron-h-8b", ["parallel.tensor=8", "data.sequence_length=4096"])
    assert (model.hidden_size, parallel.tensor, sequence_length) == (4096, 8, 4096)
    assert load_model("nemotron-h-8b")[2] == 8192
    assert load_model(run_file)[0] == load_model("hybrid-cpu-12m")[0]
    assert load_model(run_file)[2] == 512


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("nemotron-h-8", [], "neither a file nor a preset; did you mean 'nemotron-h-8b'?"),
        ("none.yaml", [], "No such file or directory"),
        ("nemotron-h-8b", ["parallel.tensor=16"], "model.mamba_num_groups=8 does not divide by parallel.tensor=16"),
        ("nemotron-h-8b", ["train.steps=1"], "unknown option 'train'"),
        ("nemotron-h-8b", ["parallel.pipeline=53"], "the model has only 52 layers"),
    ],
)
def test_load_model_refuses_what_it_cannot_use(source: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_model(source, overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_models_and_say_where_they_come_from(name: str) -> None:
    model, _, _ = load_model(name)
    assert model.position_embedding == "none" and "|" not in model.pattern
    text = Path(__file__).parents[2].joinpath("megatron_hybrid", "config", "presets", f"{name}.yaml").read_text()
    assert text.startswith("# ")
