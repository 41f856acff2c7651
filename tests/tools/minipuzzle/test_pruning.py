"""Pruning: identity, invariance under permutation, the group rules of Mamba-2, and shapes that really changed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.job import plan_conversion, publish, run_conversion
from megatron_hybrid.convert.native import NativeSource, NativeTarget
from megatron_hybrid.convert.target import Layout
from megatron_hybrid.convert.widen import WidenedSource
from megatron_hybrid.data.build import build_train_stream
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.frozen import load_frozen_chunks
from tests.tools.minipuzzle.small import PATTERN, compression
from tools.minipuzzle.candidate import Candidate
from tools.minipuzzle.parent import Parent, find_parent, weights_digest
from tools.minipuzzle.prune import PrunedSource, prune
from tools.minipuzzle.pruning import Selection, cut_tensor, keep_heads, select_parts
from tools.minipuzzle.scores import synthetic_scores

LAYERS = tuple(range(len(PATTERN)))
MLP_LAYERS = [layer for layer in LAYERS if PATTERN[layer] == "-"]
MAMBA_LAYERS = [layer for layer in LAYERS if PATTERN[layer] == "M"]


@pytest.fixture(scope="module")
def parent(parent_folder: Path) -> NativeSource:
    return NativeSource(parent_folder / "parent")


def whole(model: ModelConfig) -> Candidate:
    num_mlp = model.layer_kinds.count("-")
    return Candidate(
        tuple(range(model.num_layers)), (model.ffn_hidden_size,) * num_mlp, model.mamba_num_heads, model.mamba_head_dim, model.hidden_size
    )


def write_selected(parent: NativeSource, selection: Selection, directory: Path) -> None:
    """Prune with parts chosen by hand, instead of by scores."""
    candidate = dataclasses.replace(whole(parent.model), layers=selection.layers)
    source = PrunedSource(parent, candidate, selection)
    plan = plan_conversion(source, Layout())
    publish(run_conversion(source, NativeTarget(plan, directory), plan, directory), directory)


def logits_of(folder: Path, model_dirs: list[Path]) -> list[np.ndarray]:
    """Logits of two samples, [2, L, V] of each run directory; runs on one rank."""
    found, substrate = [], None
    for model_dir in model_dirs:
        held_out = {"sources": {"text": folder / "held_out"}}
        source = NativeSource(model_dir)
        parent = Parent(source.model, source.path, compression(folder, data=text_of(folder), validation=held_out))
        run = parent.forward_run(folder / "unused")
        substrate = substrate or initialize(run)
        (chunk,) = load_frozen_chunks(run, parent.weights, build_transformer_config(run, substrate), substrate)
        stream = build_train_stream(run)
        with torch.no_grad():
            found.append(chunk(torch.stack([torch.from_numpy(stream[index]["tokens"]) for index in range(2)])).numpy())
    shutdown(substrate)
    return found


def text_of(folder: Path) -> dict:
    return {"sources": {"text": folder / "text"}, "sequence_length": 40, "num_workers": 0, "reset_at_documents": True}


def test_a_full_width_prune_is_the_identity(parent: NativeSource, tmp_path: Path) -> None:
    directory = prune(parent, whole(parent.model), synthetic_scores(parent.model, 0), tmp_path / "same", Layout(tensor=2, pipeline=2))
    copy = NativeSource(directory)
    assert copy.model == parent.model and copy.specs == parent.specs
    for name in parent.specs:
        assert torch.equal(copy.read(name), parent.read(name)), name


def permuted(model: ModelConfig, seed: int) -> Selection:
    """Everything, in another order: neurons, heads within each group, and channels, differently in every layer."""
    generator = np.random.default_rng(seed)
    per_group = model.mamba_num_heads // model.mamba_num_groups
    return Selection(
        layers=LAYERS,
        hidden=generator.permutation(model.hidden_size),
        neurons={layer: generator.permutation(model.ffn_hidden_size) for layer in MLP_LAYERS},
        heads={
            layer: np.concatenate([group * per_group + generator.permutation(per_group) for group in range(model.mamba_num_groups)])
            for layer in MAMBA_LAYERS
        },
        channels={layer: generator.permutation(model.mamba_head_dim) for layer in MAMBA_LAYERS},
    )


def test_order_within_groups_changes_no_logits_and_order_across_groups_does(
    parent: NativeSource, parent_folder: Path, tmp_path: Path, run_ranks
) -> None:
    good = permuted(parent.model, 0)
    write_selected(parent, good, tmp_path / "good")
    across = dataclasses.replace(good, heads={layer: np.roll(heads, 2) for layer, heads in good.heads.items()})
    write_selected(parent, across, tmp_path / "across")
    ((expected, same, other),) = run_ranks(logits_of, 1, parent_folder, [parent_folder / "parent", tmp_path / "good", tmp_path / "across"])
    scale = np.abs(expected).max()
    assert np.abs(same - expected).max() < 1e-5 * scale
    assert np.abs(other - expected).max() > 1e-3 * scale


def test_layers_of_different_widths_compute_what_they_do_filled_up_with_zeros(
    parent: NativeSource, parent_folder: Path, tmp_path: Path, run_ranks
) -> None:
    candidate = dataclasses.replace(whole(parent.model), ffn_hidden_sizes=(48, 95, 64))
    mixed = NativeSource(prune(parent, candidate, synthetic_scores(parent.model, 1), tmp_path / "mixed"))
    assert mixed.model.ffn_hidden_size == (48, 95, 64)
    assert [mixed.specs[f"decoder.layers.{layer}.mlp.linear_fc1.weight"].shape[0] for layer in MLP_LAYERS] == [48, 95, 64]
    filled = WidenedSource(mixed)
    assert filled.model.ffn_hidden_size == 95 and not filled.read(f"decoder.layers.{MLP_LAYERS[0]}.mlp.linear_fc2.weight")[:, 48:].any()
    plan = plan_conversion(filled, Layout())
    publish(run_conversion(filled, NativeTarget(plan, tmp_path / "filled"), plan, tmp_path / "filled"), tmp_path / "filled")
    ((expected, got),) = run_ranks(logits_of, 1, parent_folder, [tmp_path / "filled", tmp_path / "mixed"])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_parent_of_different_widths_is_refused(parent: NativeSource, parent_folder: Path, tmp_path: Path) -> None:
    candidate = dataclasses.replace(whole(parent.model), ffn_hidden_sizes=(48, 96, 64))
    prune(parent, candidate, synthetic_scores(parent.model, 1), tmp_path / "mixed")
    with pytest.raises(ValueError, match="are 48 to 96 wide; only a parent with one width can be compressed"):
        find_parent(compression(parent_folder, parent=str(tmp_path / "mixed")))


@pytest.mark.parametrize("seed", range(20))
def test_group_rules(seed: int) -> None:
    """Any shape: as many heads in every group, the best of each; one order of channels for all heads."""
    generator = np.random.default_rng(seed)
    groups, per_group, head_dim = (int(value) for value in generator.integers(1, 6, 3))
    kept_per_group, kept_dim = int(generator.integers(1, per_group + 1)), int(generator.integers(1, head_dim + 1))
    model = ModelConfig(
        pattern="M",
        hidden_size=4,
        ffn_hidden_size=4,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=4,
        mamba_num_heads=groups * per_group,
        mamba_head_dim=head_dim,
        mamba_num_groups=groups,
        mamba_state_dim=3,
        vocab_size=8,
    )
    scores = synthetic_scores(model, seed)
    selection = select_parts(model, Candidate((0,), (), groups * kept_per_group, kept_dim, 4), scores)
    heads, channels = selection.heads[0], selection.channels[0]
    assert np.bincount(heads // per_group, minlength=groups).tolist() == [kept_per_group] * groups
    assert (np.diff(heads) > 0).all() and (np.diff(channels) > 0).all() and len(channels) == kept_dim
    energy_HP = scores.mamba[0] ** 2
    dropped_channels = np.setdiff1d(np.arange(head_dim), channels)
    assert not dropped_channels.size or energy_HP.sum(0)[dropped_channels].max() <= energy_HP.sum(0)[channels].min()
    energy_H = energy_HP[:, channels].sum(1)
    for group in range(groups):
        inside = np.arange(group * per_group, (group + 1) * per_group)
        dropped = np.setdiff1d(inside, heads)
        assert not dropped.size or energy_H[dropped].max() <= energy_H[np.intersect1d(inside, heads)].min()
    # Numbered rows show where each went: z, x and the convolution agree, B and C are whole, dt, A_log, D and dt_bias follow the heads.
    inner, states = model.mamba_inner_size, groups * 3
    expected = (heads[:, None] * head_dim + channels).reshape(-1)
    for key, size, kept in (
        ("in_proj.weight.z", inner, expected),
        ("in_proj.weight.x", inner, expected),
        ("in_proj.weight.B", states, np.arange(states)),
        ("in_proj.weight.C", states, np.arange(states)),
        ("in_proj.weight.dt", model.mamba_num_heads, heads),
        ("conv1d.weight.x", inner, expected),
        ("conv1d.bias.C", states, np.arange(states)),
        ("norm.weight", inner, expected),
        ("A_log", model.mamba_num_heads, heads),
    ):
        rows = torch.arange(size)
        tensor = rows[:, None].expand(size, 4) if key.startswith("in_proj") else rows
        cut = cut_tensor(f"decoder.layers.0.mixer.{key}", tensor, selection, model)
        assert (cut[:, 0] if cut.ndim > 1 else cut).tolist() == list(kept), key
    out = cut_tensor("decoder.layers.0.mixer.out_proj.weight", torch.arange(inner).expand(4, inner), selection, model)
    assert out[0].tolist() == list(expected)


def test_every_pruned_tensor_changed_its_shape(parent: NativeSource, tmp_path: Path) -> None:
    """Every axis reaches every tensor it runs through: nothing is left whole in silence."""
    model = parent.model
    candidate = Candidate(LAYERS[1:], (48,) * 3, 4, 8, 32)
    pruned = NativeSource(prune(parent, candidate, synthetic_scores(model, 2), tmp_path / "narrow"))
    assert (pruned.model.mamba_num_heads, pruned.model.mamba_head_dim, pruned.model.hidden_size) == (4, 8, 32)
    assert pruned.model.pattern == PATTERN[1:]
    shapes = {tensor.key: tensor.shape for each in correspondences(candidate.model(model)) for tensor in each.native}
    shift = {f"decoder.layers.{new}.": f"decoder.layers.{old}." for new, old in enumerate(candidate.layers)}
    for name, spec in pruned.specs.items():
        assert spec.shape == shapes[name]
        prefix = next((prefix for prefix in shift if name.startswith(prefix)), "")
        before = parent.specs[shift.get(prefix, "") + name[len(prefix) :]].shape
        is_whole = name.rpartition(".")[2] in ("B", "C") and "conv1d" in name
        assert (spec.shape == before) == is_whole, name


def test_an_interrupted_prune_of_another_candidate_is_begun_anew(parent: NativeSource, tmp_path: Path) -> None:
    partial = tmp_path / "child.partial"
    partial.mkdir()
    (partial / "leftover").write_text("of something else")
    directory = prune(parent, whole(parent.model), None, tmp_path / "child")
    assert not (directory / "leftover").exists() and not partial.exists()
    stamp = (directory / "config.yaml").stat().st_mtime_ns
    assert prune(parent, whole(parent.model), None, directory) == directory and (directory / "config.yaml").stat().st_mtime_ns == stamp
    other = dataclasses.replace(whole(parent.model), layers=LAYERS[:-1])
    with pytest.raises(ValueError, match="holds another candidate's weights"):
        prune(parent, other, None, directory)


def test_other_scores_keep_other_parts(parent: NativeSource, tmp_path: Path) -> None:
    candidate, directory = dataclasses.replace(whole(parent.model), ffn_hidden_sizes=(48,) * 3), tmp_path / "child"
    scores = synthetic_scores(parent.model, 1)
    before = weights_digest(NativeSource(prune(parent, candidate, scores, directory)))
    stamp = (directory / "config.yaml").stat().st_mtime_ns
    louder = dataclasses.replace(scores, neurons={layer: 2.0 * values for layer, values in scores.neurons.items()})
    prune(parent, candidate, louder, directory)
    assert (directory / "config.yaml").stat().st_mtime_ns == stamp, "the same neurons are kept: nothing to do"
    reverse = dataclasses.replace(scores, neurons={layer: -values for layer, values in scores.neurons.items()})
    prune(parent, candidate, reverse, directory)
    assert weights_digest(NativeSource(directory)) != before
    assert [path.name for path in tmp_path.iterdir()] == ["child"]


def test_what_cannot_be_pruned(parent: NativeSource, tmp_path: Path) -> None:
    narrower = dataclasses.replace(whole(parent.model), ffn_hidden_sizes=(48,) * 3)
    with pytest.raises(ValueError, match="neurons of layer 1 were not scored, so 48 of 96 cannot be chosen"):
        prune(parent, narrower, None, tmp_path / "child")
    with pytest.raises(ValueError, match="model.ffn_hidden_size=90 does not divide by|ffn_hidden_size=90 does not divide by"):
        odd = dataclasses.replace(whole(parent.model), ffn_hidden_sizes=(90,) * 3)
        prune(parent, odd, synthetic_scores(parent.model, 0), tmp_path / "odd", Layout(tensor=4))
    with pytest.raises(ValueError, match="3 heads are no multiple of the 2 groups"):
        keep_heads(np.ones(4), 3, 2)
