"""Zero-shot through a real CLIP's two halves, with random weights and a tokenizer of its own, saved and loaded like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.evaluate.zero_shot import TEMPLATES, embed_classes, load_text_tower, zero_shot_predict
from vision_agglom.teachers import load_teacher


def test_texts_lie_in_the_space_of_the_teachers_summary(clip: Path) -> None:
    tower = load_text_tower("transformers", str(clip), "cpu")
    teacher = load_teacher(TeacherConfig(name="clip", library="transformers", model=str(clip)), "cpu", torch.float32)
    texts = tower(["a photo of a cat.", "dog"])
    assert texts.shape == (2, teacher.facts.summary_channels)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    with torch.no_grad():
        output = model(**tokenizer(["dog"], return_tensors="pt"), pixel_values=torch.zeros(1, 3, 32, 32))
    # Padding a short text changes nothing: the summary is read at its end token.
    torch.testing.assert_close(torch.nn.functional.normalize(texts[1:], dim=1), output.text_embeds, rtol=1e-4, atol=1e-5)


def test_a_class_is_the_mean_of_its_sentences_and_finds_itself(clip: Path) -> None:
    tower = load_text_tower("transformers", str(clip), "cpu")
    names = ["cat", "dog", "zebra"]
    classes = embed_classes(tower, names)
    unit = torch.nn.functional.normalize
    by_hand = unit(unit(tower([template.format("dog") for template in TEMPLATES]), dim=1).mean(0), dim=0)
    torch.testing.assert_close(classes[1], by_hand)
    assert zero_shot_predict(classes * torch.tensor([[3.0], [0.1], [7.0]]), classes).tolist() == [0, 1, 2]


def test_the_text_tower_is_of_the_teachers_revision(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for loader in (transformers.AutoModel, transformers.AutoTokenizer):
        load = loader.from_pretrained
        monkeypatch.setattr(loader, "from_pretrained", lambda model, load=load, revision=None: asked.append(revision) or load(model))
    load_text_tower("transformers", str(clip), "cpu", revision="v2")
    assert asked == ["v2", "v2"]


def test_models_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="library=timm has no text towers"):
        load_text_tower("timm", "x", "cpu")
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    transformers.Dinov2Model(transformers.Dinov2Config(**options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no text tower"):
        load_text_tower("transformers", str(tmp_path), "cpu")
