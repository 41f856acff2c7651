"""Zero-shot classification: images against the texts of their classes, through a teacher's text tower and the student's head for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vision_agglom.config.evaluation import TEXT_LIBRARIES

TextTower = Callable[[list[str]], Tensor]
"""From texts to embeddings [texts, C] in the space of a teacher's summary."""

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a drawing of a {}.", "a close-up photo of a {}.")
"""Sentences that a class's name is put into; their embeddings are averaged (Radford et al. 2021)."""


def embed_classes(tower: TextTower, names: Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Return one unit vector per class, [classes, C]: the normalised mean of its sentences' normalised embeddings."""
    embedded = [normalize(tower([template.format(name) for template in templates]).float(), dim=1).mean(0) for name in names]
    return normalize(torch.stack(embedded), dim=1)


def zero_shot_predict(images_BC: Tensor, classes_KC: Tensor) -> Tensor:
    """Return the class whose text is nearest by cosine to each image's summary, int64 [B]."""
    return (normalize(images_BC.float(), dim=1) @ classes_KC.T).argmax(1)


def load_text_tower(library: str, model: str, device: torch.device | str, weights: str | None = None) -> TextTower:
    """Load the text half of a CLIP or SigLIP: transformers (hub name or folder) or open_clip (name and ``weights``).

    Raises:
        ValueError: the library has no text towers, or cannot load this one.
    """
    if library not in TEXT_LIBRARIES:
        raise ValueError(f"library={library} has no text towers; zero-shot needs a teacher from transformers or open_clip")
    try:
        return _transformers_tower(model, device) if library == "transformers" else _open_clip_tower(model, weights, device)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"{library} cannot load the text tower {model!r} (evaluation.zero_shot.text_model): {error}") from error


def _transformers_tower(model: str, device: torch.device | str) -> TextTower:
    import transformers

    whole = transformers.AutoModel.from_pretrained(model).eval().requires_grad_(False).to(device)
    if not hasattr(whole, "get_text_features"):
        raise ValueError(f"{model} has no text tower")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    # SigLIP was trained on texts padded to the full length, CLIP pads to the longest.
    padding = "max_length" if whole.config.model_type.startswith("siglip") else True

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").to(device)
        features = whole.get_text_features(**tokens)
        return features if isinstance(features, Tensor) else features.pooler_output

    return embed


def _open_clip_tower(model: str, weights: str | None, device: torch.device | str) -> TextTower:
    import open_clip

    whole = open_clip.create_model(model, pretrained=weights).eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer(model)

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        return whole.encode_text(tokenizer(texts).to(device))

    return embed
