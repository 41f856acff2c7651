"""Rearranging moves every number to its place and back, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hybrid.convert.correspondence import Correspondence, correspondences
from megatron_hybrid.convert.hub_config import model_from_hub
from megatron_hybrid.convert.rearrange import to_hub, to_native
from tests.convert.checkpoints import CONFIG, SHAPES

MODELS = [model_from_hub({**CONFIG, **changes}) for changes in SHAPES.values()]


def numbered(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors in which no number stands twice."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [part.view(shape) for part, shape in zip(torch.arange(1, sum(sizes) + 1).split(sizes), shapes, strict=True)]


@pytest.mark.parametrize("model", MODELS, ids=SHAPES)
def test_there_and_back_is_where_it_began(model: Any) -> None:
    for each in correspondences(model):
        hub = numbered([tensor.shape for tensor in each.hub])
        native = to_native(each, hub, model)
        assert [tuple(tensor.shape) for tensor in native] == [tensor.shape for tensor in each.native]
        back = to_hub(each, native, model)
        assert all(torch.equal(one, other) for one, other in zip(hub, back, strict=True)), each
        whole = torch.cat([tensor.flatten() for tensor in native])
        assert torch.equal(whole[whole > 0].sort().values, torch.cat([tensor.flatten() for tensor in hub])), (
            "every number once, and padding zeros"
        )


def find(model: Any, ending: str) -> Correspondence:
    return next(each for each in correspondences(model) if each.hub[0].name.endswith(ending))


def test_in_proj_rows_are_z_x_b_c_dt() -> None:
    model = MODELS[0].model_copy(update={"mamba_num_groups": 2})
    each = find(model, "in_proj.weight")
    rows = torch.arange(each.hub[0].shape[0])[:, None].expand(each.hub[0].shape)
    starts = {
        tensor.key.rpartition(".")[2]: int(part[0, 0]) for tensor, part in zip(each.native, to_native(each, [rows], model), strict=True)
    }
    inner, group_states = 64, 2 * 16
    assert starts == {"z": 0, "x": inner, "B": 2 * inner, "C": 2 * inner + group_states, "dt": 2 * inner + 2 * group_states}


def test_qkv_rows_run_by_kv_group() -> None:
    model = MODELS[0]
    each = find(model, "q_proj.weight")
    # Heads 0..3 are queries, 10.. keys and 20.. values.
    heads = [torch.arange(first, first + count).repeat_interleave(8)[:, None].expand(-1, 32) for first, count in ((0, 4), (10, 2), (20, 2))]
    (qkv,) = to_native(each, heads, model)
    assert qkv[::8, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_vocabulary_padding_is_added_as_zeros_and_taken_off() -> None:
    model = MODELS[0]
    each = correspondences(model)[0]
    (padded,) = to_native(each, [torch.ones(250, 32)], model)
    assert padded.shape == (256, 32) and padded[250:].eq(0).all() and padded[:250].eq(1).all()
    assert to_hub(each, [padded], model)[0].shape == (250, 32)
