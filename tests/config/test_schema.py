"""The schema refuses settings that contradict each other, and says which and what to change."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_hybrid.config import Fp8Config, RunConfig
from megatron_hybrid.config.load import load_model

RUN: dict[str, Any] = {
    "run_dir": "runs/one",
    "model": load_model("hybrid-cpu-12m")[0].model_dump(),
    "data": {"sources": {"web": "web", "code": "code"}, "sequence_length": 512},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 100, "global_batch_size": 8},
}


def run_with(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(RUN | {name: RUN.get(name, {}) | options for name, options in sections.items()})


def test_a_run_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        run_with().train.steps = 5  # type: ignore[misc]


def test_tokens_follow_from_steps_batch_and_sequence() -> None:
    assert run_with().tokens_per_step == 8 * 512
    assert run_with().total_tokens == 100 * 8 * 512


def test_derived_sizes_of_a_model() -> None:
    model = run_with(model={"pattern": "M-|M*", "vocab_size": 1000, "vocab_divisible_by": 48}).model
    assert (model.layer_kinds, model.num_layers, model.padded_vocab_size, model.mamba_inner_size) == ("M-M*", 4, 1008, 640)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_kv_heads": 3}}, "num_attention_heads=8 does not divide by num_kv_heads=3"),
        ({"model": {"mamba_num_groups": 3}}, "mamba_num_heads=8 does not divide by mamba_num_groups=3"),
        ({"model": {"mamba_num_groups": 2}, "parallel": {"tensor": 4}}, "model.mamba_num_groups=2 does not divide by parallel.tensor=4"),
        ({"model": {"num_kv_heads": 2}, "parallel": {"tensor": 4}}, "model.num_kv_heads=2 does not divide by parallel.tensor=4"),
        ({"model": {"vocab_divisible_by": 1, "vocab_size": 4097}, "parallel": {"tensor": 2}}, "padded vocabulary=4097"),
        ({"parallel": {"tensor": 4, "sequence_parallel": True}, "data": {"sequence_length": 510}}, "data.sequence_length=510 does not"),
        ({"parallel": {"virtual_pipeline": 2}}, "virtual_pipeline=2 needs pipeline above 1"),
        ({"parallel": {"overlap_param_gather": True}}, "overlap_param_gather=true needs"),
        ({"parallel": {"data": 3}}, "train.global_batch_size=8 does not divide by parallel.data x train.micro_batch_size=3"),
        ({"parallel": {"pipeline": 20}}, "asks for 20 stages, but the model has only 12 layers"),
        ({"train": {"micro_batch_size": 3}}, "global_batch_size=8 does not divide by micro_batch_size=3"),
        ({"optimizer": {"min_lr": 1.0}}, "min_lr=1.0 is above lr=0.001"),
        ({"schedule": {"kind": "wsd"}}, "needs schedule.decay_tokens"),
        ({"schedule": {"kind": "constant", "decay_tokens": "1K"}}, "takes no decay_tokens"),
        ({"data": {"phases": []}}, "phases is empty"),
        ({"data": {"phases": [{"start": "10%"}]}}, "the first phase must start at 0"),
        ({"data": {"phases": [{}, {"start": "60%"}, {"start": "50%"}]}}, "phases must start one after another"),
        ({"data": {"phases": [{"blend": {"web": 1, "books": 1}}]}}, r"blend names \['books'\]"),
        ({"data": {"phases": [{"blend": {"web": 0}}]}}, "every blend weight is 0"),
        ({"data": {"phases": [{"blend": {"web": -1}}]}}, "must be zero or more"),
    ],
)
def test_contradictions_are_refused(sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_with(**sections)


FP8 = {"recipe": "delayed"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fp8": {"recipe": "current", "delayed": {"margin": 1}}}, "recipe=current keeps no history"),
        ({"fp8": {"telemetry_every_steps": 1}}, "recipe=off reads no other option, and telemetry_every_steps is set; set recipe=delayed"),
        ({"fp8": {"bf16_layers_at_start": 99, "delayed": {"margin": 1}}}, "and delayed, bf16_layers_at_start are set"),
        ({"fp8": FP8 | {"delayed": {"margin": 19}}}, "less than or equal to 18"),
        ({"fp8": FP8 | {"linears": ["in_proj", "in_proj"]}}, "names one twice"),
        ({"fp8": FP8 | {"linears": []}}, "at least 1 item"),
        ({"fp8": FP8 | {"linears": ["lm_head"]}}, "Input should be 'in_proj'"),
        ({"fp8": FP8 | {"bf16_layers_at_start": 12}}, "no linear .* 12 layers, of which 12 at the start.*set 'fp8={recipe: off}'"),
        ({"fp8": FP8, "data": {"sequence_length": 500}}, "micro_batch_size=500 is no multiple of 16.*set 'fp8={recipe: off}'"),
    ],
)
def test_float8_that_cannot_be_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_with(**sections)


def test_float8_is_off_unless_asked_for() -> None:
    assert run_with(data={"sequence_length": 500}).fp8.recipe == "off"
    written_out = Fp8Config().model_dump(mode="json")
    assert run_with(data={"sequence_length": 500}, fp8=written_out).fp8 == Fp8Config()


def test_dimensions_that_no_layer_uses_need_not_divide() -> None:
    assert run_with(model={"pattern": "M-M-", "num_kv_heads": 1}, parallel={"tensor": 4}).parallel.tensor == 4


def test_mlp_layers_may_differ_in_width() -> None:
    model = run_with(model={"pattern": "M-|M-*-", "ffn_hidden_size": [64, 48, 64]}).model
    assert model.ffn_hidden_size == model.ffn_hidden_sizes == (64, 48, 64)
    assert [model.of_layer(layer).ffn_hidden_size for layer in (1, 3, 5)] == [64, 48, 64]
    # One model is written in one way.
    assert run_with(model={"pattern": "M-M-", "ffn_hidden_size": [64, 64]}).model.ffn_hidden_size == 64
    assert run_with(model={"pattern": "M-M-", "ffn_hidden_size": 64}).model.ffn_hidden_sizes == (64, 64)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([64, 48], r"\[64, 48\] names 2 widths, but the pattern has 3 MLP layers; give one for each"),
        ([64, 64], "names 2 widths, but the pattern has 3 MLP layers"),
        ([64, 0, 64], r"expected a whole number above 0, or a list of them, got \[64, 0, 64\]"),
        (-1, "expected a whole number above 0, or a list of them, got -1"),
        (True, "or a list of them, got True"),
        ("wide", "or a list of them, got 'wide'"),
    ],
)
def test_widths_that_cannot_be(widths: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        run_with(model={"pattern": "M-M-*-", "ffn_hidden_size": widths})


def test_tensor_ranks_must_divide_every_width() -> None:
    with pytest.raises(ValidationError, match="model.ffn_hidden_size=50 does not divide by parallel.tensor=4"):
        run_with(model={"pattern": "M-M-", "ffn_hidden_size": [64, 50]}, parallel={"tensor": 4})
