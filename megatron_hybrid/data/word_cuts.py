"""Where text can be cut so that encoding the pieces equals encoding the whole, read off a sentencepiece BPE vocabulary.

BPE only ever merges two neighbouring symbols into one that is in the vocabulary. A merge across a place between characters ``a`` and ``b``
would make a symbol with ``ab`` inside, so where no vocabulary entry contains ``ab``, nothing merges across, and the two sides are encoded
independently. Words found that way repeat, and a table of their encodings is faster than the merges.
"""

from __future__ import annotations

import re

from sentencepiece import sentencepiece_model_pb2 as model_pb2

_SPACE_MARK = "\u2581"
_CLASSES = {"space": f" {_SPACE_MARK}", "letter": "A-Za-z", "digit": "0-9", "break": r"\r\n\t", "mark": r"!-/:-@\[-`{-~"}
_CLASSES["other"] = "^" + "".join(_CLASSES.values())


def word_pattern(model_proto: bytes) -> re.Pattern[str] | None:
    """Return a pattern whose successive matches cover any text and are encoded independently by the model.

    None where the argument above does not hold: another algorithm than BPE, a normaliser that rewrites text or adds a leading space, or no
        byte fallback (neighbouring unknown characters then share one token).
    """
    model = model_pb2.ModelProto.FromString(model_proto)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    rewrites = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if trainer.model_type != model_pb2.TrainerSpec.BPE or not trainer.byte_fallback or rewrites:
        return None
    entry = model_pb2.ModelProto.SentencePiece
    symbols = [piece.piece for piece in model.pieces if piece.type in (entry.NORMAL, entry.USER_DEFINED, entry.UNUSED)]
    joined = {(_character_class(a), _character_class(b)) for symbol in symbols for a, b in zip(symbol, symbol[1:], strict=False)}
    steps = []
    for name, characters in _CLASSES.items():
        followers = "|".join(f"[{_CLASSES[after]}]" for after in _CLASSES if (name, after) in joined)
        if followers:
            steps.append(f"[{characters}]{'+' if (name, name) in joined else ''}(?={followers})")
    return re.compile(f"(?:{'|'.join(steps)})*[\\s\\S]")


def _character_class(character: str) -> str:
    return next(name for name, members in _CLASSES.items() if re.fullmatch(f"[{members}]", character))
