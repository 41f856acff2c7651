"""Every kind of teacher through the one door: what it gives, what it expects, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from tests.vision_agglom.teachers.conftest import TWINS, twin
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.images.mosaic import MosaicTeacher
from vision_agglom.teachers import load_teacher
from vision_agglom.teachers.frozen import FrozenTeacher

FIXED = {"clip", "siglip", "sam", "sam3"}


def load(spec: TeacherConfig, dtype: torch.dtype = torch.float32) -> FrozenTeacher:
    """On the CPU."""
    return load_teacher(spec, "cpu", dtype)


def images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Noise in [0, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", TWINS)
def test_facts_are_what_comes_out(kind: str) -> None:
    teacher = load(twin(kind))
    facts = teacher.facts
    features = teacher(images(3, facts.resolution))
    rows = facts.resolution // facts.patch_size
    assert features.grid == (rows, rows)
    assert features.spatial_BTC.shape == (3, rows * rows, facts.spatial_channels)
    assert (features.summary_BC is None) == (kind == "sam") == (facts.summary_channels is None)
    if features.summary_BC is not None:
        assert features.summary_BC.shape == (3, facts.summary_channels)
    assert facts.fixed_resolution == (kind in FIXED)
    assert features.spatial_BTC.std() > 0.01 and (features.spatial_BTC[0] - features.spatial_BTC[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", TWINS)
def test_a_twin_is_decided_by_its_seed_and_frozen(kind: str) -> None:
    before = torch.get_rng_state()
    one, same, other = (load(twin(kind, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    inputs = images(2, one.facts.resolution)
    assert torch.equal(one(inputs).spatial_BTC, same(inputs).spatial_BTC)
    assert not torch.equal(one(inputs).spatial_BTC, other(inputs).spatial_BTC)
    assert not any(parameter.requires_grad for parameter in one.tower.module.parameters())
    assert not one(inputs.requires_grad_()).spatial_BTC.requires_grad and not one.tower.module.training


@pytest.mark.parametrize("kind", TWINS)
def test_slices_change_nothing(kind: str) -> None:
    inputs = images(5, load(twin(kind)).facts.resolution)
    whole, sliced = load(twin(kind))(inputs), load(twin(kind, slice_size=2))(inputs)
    torch.testing.assert_close(whole.spatial_BTC, sliced.spatial_BTC, rtol=1e-5, atol=1e-6)
    if whole.summary_BC is not None:
        torch.testing.assert_close(whole.summary_BC, sliced.summary_BC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", TWINS)
def test_bf16_is_near_fp32(kind: str) -> None:
    full, half = load(twin(kind)), load(twin(kind), torch.bfloat16)
    inputs = images(2, full.facts.resolution)
    expected, got = full(inputs).spatial_BTC, half(inputs).spatial_BTC
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", sorted(set(TWINS) - FIXED))
def test_sides_may_be_any_multiple_of_the_patch_and_need_not_be_equal(kind: str) -> None:
    teacher = load(twin(kind))
    patch = teacher.facts.patch_size
    features = teacher(torch.rand(1, 3, 2 * patch, 5 * patch))
    assert features.grid == (2, 5) and features.spatial_BTC.shape[1] == 10


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_other_sides_of_a_clip_are_interpolated_where_asked_for(kind: str) -> None:
    assert load(twin(kind, sides="any"))(images(1, 96)).grid == (6, 6)
    larger = load(twin(kind, resolution=96))
    assert larger.facts.resolution == 96 and larger.facts.fixed_resolution


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_side_of_broken_patches_is_run_as_whole_ones(kind: str) -> None:
    """As SigLIP's published 384 pixels with patches of 14: 27 x 27 patches, of which the model sees 378 pixels."""
    options = TWINS[kind]["options"] | {"image_size": 60, "patch_size": 14}
    teacher = load(twin(kind, options=options))
    assert (teacher.facts.resolution, teacher.facts.fixed_resolution) == (56, True)
    inputs = images(2, 56)
    features = teacher(inputs)
    assert features.grid == (4, 4)
    # The model itself, at the side that it was made for, whatever the four pixels beyond are.
    pixels = (torch.nn.functional.pad(inputs, (0, 4, 0, 4), value=0.7) - teacher.mean_C.view(-1, 1, 1)) / teacher._std_C.view(-1, 1, 1)
    with torch.no_grad():
        output = (teacher.tower.module.vision_model if kind == "clip" else teacher.tower.module)(pixel_values=pixels)
    if kind == "clip":
        expected = teacher.tower.module.vision_model.post_layernorm(output.last_hidden_state[:, 1:])
    else:
        expected = output.last_hidden_state
    torch.testing.assert_close(features.spatial_BTC, expected)


def test_the_input_is_normalised_with_the_teachers_own_numbers() -> None:
    """Against the library called directly."""
    teacher = load(twin("dinov2", seed=3))
    inputs = images(2, 56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.Dinov2Model(transformers.Dinov2Config(**TWINS["dinov2"]["options"])).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = model(pixel_values=(inputs - mean) / std).last_hidden_state
    features = teacher(inputs)
    torch.testing.assert_close(features.spatial_BTC, tokens[:, 1:])
    torch.testing.assert_close(features.summary_BC, tokens[:, 0])


def test_radio_is_the_library_called_directly_and_the_plain_vit_on_its_weights_agrees() -> None:
    teacher = load(twin("radio"))
    inputs = images(2, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.RadioModel(transformers.RadioConfig(**TWINS["radio"]["options"])).eval()
    with torch.no_grad():
        expected = model(inputs)
    features = teacher(inputs)
    torch.testing.assert_close(features.spatial_BTC, expected.features)
    torch.testing.assert_close(features.summary_BC, expected.summary)


def test_siglip2_in_patches_is_siglip_on_pixels() -> None:
    """The two models share their arithmetic, so one's weights in the other check the order of our patches."""
    pixels, patches = load(twin("siglip")), load(twin("siglip2"))
    state = pixels.tower.module.state_dict()
    weight = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
    patches.tower.module.load_state_dict({name: value for name, value in state.items() if not name.endswith("position_ids")})
    inputs = images(2, 64)
    torch.testing.assert_close(pixels(inputs).spatial_BTC, patches(inputs).spatial_BTC, rtol=1e-4, atol=1e-5)


LIBRARY_CLASSES = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "sam": ("SamVisionConfig", "SamVisionModel"),
    "radio": ("RadioConfig", "RadioModel"),
}


@pytest.mark.parametrize("kind", LIBRARY_CLASSES)
def test_saved_weights_load_by_the_same_code(kind: str, tmp_path: Path) -> None:
    config_class, model_class = (getattr(transformers, name) for name in LIBRARY_CLASSES[kind])
    options = TWINS[kind]["options"] | ({"initializer_range": 0.02} if kind == "sam" else {})
    numbers = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    if kind == "radio":  # its configuration holds them; the others' preprocessors do
        options |= {f"norm_{name}": values for name, values in numbers.items()}
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({f"image_{name}": values for name, values in numbers.items()}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model_class(config_class(**options)).save_pretrained(tmp_path)
    made = load(twin(kind, seed=4, options=options, **numbers))
    loaded = load(TeacherConfig(name="t", library="transformers", model=str(tmp_path), resolution=made.facts.resolution))
    inputs = images(2, made.facts.resolution)
    assert loaded.facts == made.facts
    torch.testing.assert_close(loaded(inputs).spatial_BTC, made(inputs).spatial_BTC)


def test_the_vision_half_of_a_whole_clip_is_loaded(tmp_path: Path) -> None:
    vision = TWINS["clip"]["options"] | {"projection_dim": 24}
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 50,
        "projection_dim": 24,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    torch.nn.init.normal_(model.vision_model.post_layernorm.weight)
    model.save_pretrained(tmp_path)
    teacher = load(TeacherConfig(name="t", library="transformers", model=str(tmp_path)))
    inputs = images(2, 64)
    mean, std = teacher.mean_C.view(3, 1, 1), torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=(inputs - mean) / std)
        tokens = model.vision_model(pixel_values=(inputs - mean) / std).last_hidden_state
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    torch.testing.assert_close(teacher(inputs).summary_BC, expected)
    # Normalised like the class token, as open_clip returns tokens.
    norm = model.vision_model.post_layernorm
    expected_spatial = torch.nn.functional.layer_norm(tokens[:, 1:], (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(teacher(inputs).spatial_BTC, expected_spatial)


def test_a_mosaic_of_windowed_sam_is_each_image_by_itself() -> None:
    """With windows that no cell's edge cuts and no global attention, SAM at 128 pixels sees each 32-pixel cell as SAM at 32 would."""
    options = TWINS["sam"]["options"] | {"global_attn_indexes": []}
    large, small = (load(twin("sam", options=options | {"image_size": side})) for side in (128, 32))
    mosaic = MosaicTeacher(large, 32, large.mean_C)
    inputs = images(19, 32)
    assert mosaic.plan.per_side == 4
    torch.testing.assert_close(mosaic(inputs).spatial_BTC, small(inputs).spatial_BTC, rtol=1e-5, atol=1e-6)


def test_output_scale_and_no_summary() -> None:
    plain, scaled = load(twin("clip")), load(twin("clip", output_scale=100.0, summary="none"))
    inputs = images(1, 64)
    torch.testing.assert_close(scaled(inputs).spatial_BTC, plain(inputs).spatial_BTC * 100)
    assert scaled(inputs).summary_BC is None and scaled.facts.summary_channels is None


def test_inputs_are_resized_only_where_asked_for() -> None:
    teacher = load(twin("sam", resize_input=True))
    assert teacher(images(1, 100)).grid == (4, 4)
    flat = torch.full((1, 3, 50, 90), 0.3)
    torch.testing.assert_close(teacher(flat).spatial_BTC, teacher(torch.full((1, 3, 64, 64), 0.3)).spatial_BTC, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"teacher 't' takes images of 64 x 64 pixels, got 100 x 100; set its resize_input=true"):
        load(twin("sam"))(images(1, 100))
    with pytest.raises(ValueError, match=r"patches of 14 pixels, which 60 x 60 does not divide into; choose multiples of 14"):
        load(twin("dinov2"))(images(1, 60))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet"}, "no teacher is of the kind 'resnet'; expected one of clip, siglip"),
        ({"options": {"hiden_size": 3}}, "Dinov2Config has no hiden_size"),
        ({"resolution": 60}, "resolution=60 is no multiple of its patch of 14 pixels; write 56 or 70"),
        ({"model": "/no/such/folder", "pretrained": True, "options": {}}, "transformers cannot build '/no/such/folder'"),
        ({"library": "checkpoint", "model": "/no/such/file.pth", "pretrained": True, "options": {}}, "No such file"),
        ({"library": "checkpoint", "options": {"hidden": 3}}, "a plain ViT has no hidden"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=message) as caught:
        load(twin("dinov2", **changes))
    assert str(caught.value).startswith("teacher 't'")


def test_a_sam_of_another_side_is_refused() -> None:
    with pytest.raises(ValueError, match="runs at 64 pixels only"):
        load(twin("sam", sides="any"))
    with pytest.raises(ValueError, match="runs at 64 pixels only"):
        load(twin("sam", resolution=128))


def test_only_two_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected torch.float32 or torch.bfloat16, got torch.float16"):
        load(twin("clip"), torch.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 3}, "seed=3 is not read with pretrained=true"),
        ({"pretrained": False, "weights": "dfn5b"}, "weights='dfn5b' is not read with pretrained=false"),
        ({"weights": "dfn5b"}, "weights is read with library=open_clip only"),
        ({"library": "open_clip"}, "open_clip needs weights"),
        ({"library": "torch_hub"}, "torch_hub needs model as REPO:ENTRY"),
        ({"revision": "v1", "pretrained": False}, "revision='v1' is read with library=transformers and pretrained=true only"),
        ({"revision": "v1", "library": "timm"}, "revision='v1' is read with library=transformers and pretrained=true only"),
        ({"mean": (0, 0, 0)}, "give mean and std together"),
        ({"output_scale": 2.0}, "output_scale=2.0 is for twins"),
        ({"name": "a.b"}, "should match pattern"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig.model_validate({"name": "t", "library": "transformers", "model": "x", **options})
