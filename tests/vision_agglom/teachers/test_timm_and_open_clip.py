"""timm and open_clip, where they import (both need a torchvision that fits torch; extra "teachers")."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.teachers import load_teacher
from vision_agglom.teachers.frozen import FrozenTeacher

TIMM_TWINS = {
    "vit_tiny_patch16_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
    "vit_base_patch16_siglip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
    "vit_base_patch16_clip_224": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
    "vit_base_patch14_reg4_dinov2": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56},
    "vit_base_patch16_dinov3": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64},
    "samvit_base_patch16": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "global_attn_indexes": (1,), "window_size": 2},
}


def load(library: str, model: str, **changes: object) -> FrozenTeacher:
    """A twin on the CPU."""
    spec = TeacherConfig.model_validate({"name": "t", "library": library, "model": model, "pretrained": False, **changes})
    return load_teacher(spec, "cpu", torch.float32)


@pytest.mark.parametrize("model", TIMM_TWINS)
def test_timm(model: str) -> None:
    timm = pytest.importorskip("timm")
    teacher = load("timm", model, options=TIMM_TWINS[model], seed=3)
    side, patch = teacher.facts.resolution, teacher.facts.patch_size
    images = torch.rand(2, 3, side, side)
    features = teacher(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = timm.create_model(model, pretrained=False, num_classes=0, **TIMM_TWINS[model]).eval()
    mean, std = (torch.tensor(reference.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    is_sam = model.startswith("sam")
    if is_sam:
        reference.neck = torch.nn.Identity()
    with torch.no_grad():
        expected = reference.forward_features((images - mean) / std)
        pooled = None if is_sam else reference((images - mean) / std)
    expected = expected.flatten(2).mT if is_sam else expected[:, reference.num_prefix_tokens :]
    torch.testing.assert_close(features.spatial_BTC, expected)
    assert features.grid == (side // patch, side // patch)
    if is_sam:
        assert features.summary_BC is None and teacher.facts.fixed_resolution
    else:
        torch.testing.assert_close(features.summary_BC, pooled)


def test_timm_at_any_side() -> None:
    pytest.importorskip("timm")
    teacher = load("timm", "vit_tiny_patch16_224", options=TIMM_TWINS["vit_tiny_patch16_224"], sides="any")
    assert teacher(torch.rand(1, 3, 32, 96)).grid == (2, 6)
    with pytest.raises(ValueError, match="takes images of 64 x 64 pixels, got 32 x 96"):
        load("timm", "vit_tiny_patch16_224", options=TIMM_TWINS["vit_tiny_patch16_224"])(torch.rand(1, 3, 32, 96))


def test_a_timm_checkpoint_file_is_read_without_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=64).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    spec = TeacherConfig(name="t", library="checkpoint", model=str(tmp_path / "x.pth"), options={"num_heads": 3})
    teacher = load_teacher(spec, "cpu", torch.float32)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = model.forward_features((images - mean) / std)
    torch.testing.assert_close(teacher(images).spatial_BTC, tokens[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(teacher(images).summary_BC, tokens[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["ViT-B-32-quickgelu", "ViT-B-16-SigLIP"])
def test_open_clip(model: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    options = {"image_size": 64, "width": 32, "layers": 2, "patch_size": 16, "head_width": 16} if "SigLIP" not in model else {}
    teacher = load("open_clip", model, options=options, seed=3)
    side = teacher.facts.resolution
    images = torch.rand(2, 3, side, side)
    changes = {"vision_cfg": open_clip.get_model_config(model)["vision_cfg"] | options} if options else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reference = open_clip.create_model(model, pretrained=None, pretrained_text=False, **changes).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (reference.visual.image_mean, reference.visual.image_std))
    with torch.no_grad():
        expected = reference.encode_image((images - mean) / std)
    features = teacher(images)
    torch.testing.assert_close(features.summary_BC, expected)
    assert features.spatial_BTC.shape[1] == (side // 16) ** 2


OPEN_CLIP_TWIN = {"image_size": 64, "width": 32, "layers": 2, "patch_size": 16, "head_width": 16}


def test_open_clip_at_any_side() -> None:
    """Positions as open_clip resizes those that it loads into a model of another size."""
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import resize_pos_embed

    teacher = load("open_clip", "ViT-B-32-quickgelu", options=OPEN_CLIP_TWIN, sides="any", seed=3)
    assert not teacher.facts.fixed_resolution
    assert teacher(torch.rand(1, 3, 32, 96)).grid == (2, 6)
    vision = open_clip.get_model_config("ViT-B-32-quickgelu")["vision_cfg"] | OPEN_CLIP_TWIN | {"image_size": 96}
    larger = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None, pretrained_text=False, vision_cfg=vision).eval()
    state = larger.state_dict() | {f"visual.{name}": tensor for name, tensor in teacher.tower.module.state_dict().items()}
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        expected = larger.encode_image((images - teacher.mean_C.view(3, 1, 1)) / teacher._std_C.view(3, 1, 1))
    torch.testing.assert_close(teacher(images).summary_BC, expected)


def test_open_clips_siglip_at_any_side_and_at_its_own() -> None:
    pytest.importorskip("open_clip")
    own, free = (load("open_clip", "ViT-B-16-SigLIP", seed=3, sides=sides) for sides in ("own", "any"))
    images = torch.rand(1, 3, 224, 224)
    torch.testing.assert_close(free(images).spatial_BTC, own(images).spatial_BTC)
    assert free(torch.rand(1, 3, 64, 96)).grid == (4, 6)


def test_a_timm_model_with_broken_patches_sees_whole_ones() -> None:
    pytest.importorskip("timm")
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 60}
    teacher = load("timm", "vit_so400m_patch14_siglip_384", options=options)
    assert (teacher.facts.resolution, teacher.facts.fixed_resolution) == (56, True)
    assert teacher(torch.rand(1, 3, 56, 56)).grid == (4, 4)


def test_a_library_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.delitem(__import__("sys").modules, "vision_agglom.teachers.timm_tower", raising=False)
    with pytest.raises(ValueError, match="teacher 't': library=timm does not import here: import of timm halted"):
        load("timm", "vit_tiny_patch16_224")
