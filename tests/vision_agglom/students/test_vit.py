"""The student computes what a plain ViT computes, with its options one by one; pretrained weights arrive whole in any cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.vision_agglom.small import STUDENT, small_vision_run
from tests.vision_agglom.students.single import student_on
from vision_agglom.config.schema import VisionConfig
from vision_agglom.flops import backbone_parameters
from vision_agglom.heads import give_zero_gradients
from vision_agglom.plain.vit import PlainViT, PlainViTShape
from vision_agglom.students.layers import _into_windows, _out_of_windows
from vision_agglom.students.sequence import ImageSequence


def student_run(folder: Path, student: dict[str, Any], **parallel: Any) -> VisionConfig:
    return small_vision_run(folder, student={**student}, parallel=parallel)


@pytest.mark.parametrize("grid", [(4, 4), (6, 4)])
def test_windows_and_back(grid: tuple[int, int]) -> None:
    sequence = ImageSequence(num_prefix=3, grid=grid, window=2)
    tokens = torch.randn(2, sequence.length, 2, 5)
    windows = _into_windows(tokens, sequence)
    assert windows.shape == (2 * grid[0] * grid[1] // 4, 3 + 4, 2, 5)
    torch.testing.assert_close(windows[0, 3:], tokens[0, 3 + torch.tensor([0, 1, grid[1], grid[1] + 1])])
    torch.testing.assert_close(_out_of_windows(windows[:, 3:], sequence), tokens[:, 3:])


def test_padding_fills_up_to_the_multiple() -> None:
    sequence = ImageSequence(num_prefix=4, grid=(3, 3), multiple=8)
    assert (sequence.length, sequence.padded_length) == (13, 16)


def windowed_as_global(run: VisionConfig) -> list[float]:
    """Largest differences between one window over the whole image, smaller windows, and global attention."""
    with student_on(run) as (model, _):
        model.eval()
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            whole, one, four = (model(images, window=window).patches_BTD for window in (None, 4, 2))
        return [float((other - whole).abs().max()) for other in (one, four)]


def test_one_window_over_everything_is_global_attention(tmp_path: Path, run_ranks) -> None:
    run = small_vision_run(
        tmp_path,
        student={"windows": {"sizes": [2, 4], "num_global_blocks": 1}},
        stages=[{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 1}]}],
    )
    ((one, four),) = run_ranks(windowed_as_global, 1, run)
    assert one < 1e-6 < 1e-4 < four


def plain_vit(gain: float) -> PlainViT:
    shape = PlainViTShape(
        hidden_size=STUDENT["hidden_size"],
        num_layers=STUDENT["num_layers"],
        num_heads=STUDENT["num_attention_heads"],
        patch_size=STUDENT["patch_size"],
        mlp_hidden_size=STUDENT["ffn_hidden_size"],
        num_cls_tokens=1,
        table_side=8,
        layer_scale=True,
        final_norm=True,
    )
    model = PlainViT(shape).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain)
    return model


def features_of(run: VisionConfig, images: torch.Tensor) -> np.ndarray:
    from vision_agglom.students.pretrained import load_pretrained

    with student_on(run) as (model, substrate):
        load_pretrained([model], run, substrate)
        model.eval()
        with torch.no_grad():
            # The plain ViT has one class token and no others: these are taken out of the way of attention.
            model.num_prefix = 1
            model.embedding.prefix_tokens = torch.nn.Parameter(model.embedding.prefix_tokens[:1] * 0 + run_token(run))
            return model(images).patches_BTD.numpy()


def run_token(run: VisionConfig) -> torch.Tensor:
    return torch.load(run.student.initialize_from, weights_only=True)["base_model.patch_generator.cls_token.token"]


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence_parallel": True}], ids=["one", "tp2-sp"])
@pytest.mark.parametrize("spectral", [False, True])
def test_pretrained_weights_give_the_plain_vits_features(layout: dict[str, Any], spectral: bool, tmp_path: Path, run_ranks) -> None:
    """Qkv's arrangement, norms, LayerScale and positions, against the plain ViT on the same file; spectral scales start at the identity."""
    plain = plain_vit(0.1)
    torch.save(plain.state_dict(), tmp_path / "vit.pth")
    student = {
        "initialize_from": tmp_path / "vit.pth",
        "layer_scale": 1.0,
        "final_norm": True,
        "spectral_reparam": spectral,
        "mean": plain.shape.mean,
        "std": plain.shape.std,
    }
    images = torch.rand(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(images)[1].numpy()
    for features in run_ranks(features_of, 2 if layout else 1, student_run(tmp_path, student, **layout), images):
        np.testing.assert_allclose(features, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_files_of_another_student_are_refused(tmp_path: Path, run_ranks) -> None:
    from tests.train.training import raised_by

    torch.save({"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "vit.pth")
    run = student_run(tmp_path, {"initialize_from": tmp_path / "vit.pth"})
    (message,) = run_ranks(raised_by, 1, features_of, run, torch.zeros(1, 3, 32, 32))
    assert f"student.initialize_from={tmp_path / 'vit.pth'}: expected parameters of NVlabs' RADIO" in message


def count(run: VisionConfig) -> int:
    with student_on(run) as (model, _):
        return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("heads."))


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "layer_scale": 1.0, "final_norm": True, "spectral_reparam": True}])
def test_parameters_are_counted_exactly(options: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    run = student_run(tmp_path, options)
    assert run_ranks(count, 1, run) == [backbone_parameters(run.student, run.num_prefix_tokens)]


def largest_singular_values(run: VisionConfig) -> list[float]:
    """Relative errors of sigma, and of its gradients, against the decomposition of the whole weight."""
    from torch import distributed

    with student_on(run) as (model, substrate):
        errors = []
        for linear in (model.blocks[0].self_attention.linear_qkv, model.blocks[0].mlp.linear_fc2):
            spectral = linear.spectral
            # One direction stands out, as power iteration needs to end.
            linear.weight.data += 0.05
            spectral.update(linear.weight, iterations=50)
            parts = [torch.empty_like(linear.weight) for _ in range(substrate.tensor_size)]
            distributed.all_gather(parts, linear.weight.detach().contiguous(), group=substrate.tensor_group)
            whole = torch.cat(parts, linear.axis).requires_grad_()
            chunks = spectral._chunk(whole)
            exact = torch.linalg.matrix_norm(chunks, ord=2)
            exact.sum().backward()
            # Each rank uses a third of every scale; together they use them once.
            spectral._sigma(linear.weight).sum().backward()
            own = whole.grad.chunk(substrate.tensor_size, linear.axis)[substrate.tensor_rank]
            errors.append(float((spectral._sigma(linear.weight) / exact - 1).detach().abs().max()))
            errors.append(float((linear.weight.grad - own).abs().max() / own.abs().max()))
        return errors


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["one", "tp2"])
def test_sigma_is_the_whole_weights(layout: dict[str, Any], tmp_path: Path, run_ranks) -> None:
    run = student_run(tmp_path, {"spectral_reparam": True}, **layout)
    for errors in run_ranks(largest_singular_values, 2 if layout else 1, run):
        assert max(errors) < 1e-3, errors


def test_absent_heads_get_zeros_and_the_rest_is_untouched() -> None:
    used, absent = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    (give_zero_gradients(used * 2, [absent]).sum()).backward()
    assert torch.equal(used.grad, torch.full((3,), 2.0)) and torch.equal(absent.grad, torch.zeros(2))


def every_gradient(run: VisionConfig) -> list[str]:
    """Parameters without a gradient after a step in which every teacher takes part."""
    from megatron_hybrid.substrate.groups import initialize, shutdown
    from megatron_hybrid.train.optimizer import wrap_data_parallel
    from tests.vision_agglom.small import RandomTeacher, SyntheticStream
    from vision_agglom.students.build import build_transformer_config
    from vision_agglom.task import Distillation

    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    task = Distillation(run, config, substrate, load=RandomTeacher, open_stream=SyntheticStream)
    (chunk,) = wrap_data_parallel(task.build_chunks(), run, config)
    data = task.training_data(0)
    loss, _ = task.forward_step(iter(next(data).micro_batches), chunk)
    loss.backward()
    names = [name for name, parameter in chunk.module.named_parameters() if not parameter.main_grad.any()]
    shutdown(substrate)
    return names


def test_every_parameter_learns(tmp_path: Path, run_ranks) -> None:
    from tests.vision_agglom.test_layout_parity import EVERYTHING

    sections = {**EVERYTHING, "student": {**EVERYTHING["student"], "position_dropout": 0.0}}
    stages = [{"steps": 1, "partitions": [{"resolutions": [32], "batch_size": 8, "micro_batch_size": 8}]}]
    (names,) = run_ranks(every_gradient, 1, small_vision_run(tmp_path, stages=stages, **sections))
    assert names == []
