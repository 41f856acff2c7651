"""A candidate: which layers of the parent it keeps, how wide its MLP layers are, and the other widths."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP


@dataclass(frozen=True)
class Candidate:
    """A smaller model made of a parent's parts."""

    layers: tuple[int, ...]
    """The parent's layers that are kept, in order."""
    ffn_hidden_sizes: tuple[int, ...]
    """Width of each kept MLP layer, in order; a candidate of the grid has one width for all."""
    mamba_num_heads: int
    mamba_head_dim: int
    hidden_size: int

    def pattern(self, parent: ModelConfig) -> str:
        """Its layer kinds: a subsequence of the parent's."""
        return "".join(parent.layer_kinds[layer] for layer in self.layers)

    def model(self, parent: ModelConfig) -> ModelConfig:
        """Its configuration."""
        changes = {
            "pattern": self.pattern(parent),
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_sizes or parent.ffn_hidden_size,
            "mamba_num_heads": self.mamba_num_heads,
            "mamba_head_dim": self.mamba_head_dim,
        }
        return ModelConfig.model_validate(parent.model_dump() | changes)

    @property
    def name(self) -> str:
        """A name that no other candidate has."""
        digest = hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=4).hexdigest()
        return f"{len(self.layers)}layers-{digest}"

    def keeps_widths(self, parent: ModelConfig) -> bool:
        """Whether only layers and neurons are missing, which a mask over the parent can show."""
        return (self.hidden_size, self.mamba_num_heads, self.mamba_head_dim) == (
            parent.hidden_size,
            parent.mamba_num_heads,
            parent.mamba_head_dim,
        )

    def describe(self, parent: ModelConfig) -> str:
        """Counts and widths, for a table.

        >>> parent = ModelConfig(pattern="M-*-", hidden_size=8, ffn_hidden_size=16, num_attention_heads=2, num_kv_heads=1, head_dim=4,
        ...     mamba_num_heads=2, mamba_head_dim=4, mamba_num_groups=1, mamba_state_dim=4, vocab_size=16)
        >>> Candidate((0, 1), (12,), 2, 4, 8).describe(parent)
        'M 1  * 0  - 1  ffn 12'
        """
        kinds = self.pattern(parent)
        widths = sorted(set(self.ffn_hidden_sizes))
        ffn = "ffn " + (f"{widths[0]}" if len(widths) == 1 else f"{widths[0]}..{widths[-1]}") if widths else "no ffn"
        others = [
            f"{name} {value}"
            for name, value, own in (
                ("heads", self.mamba_num_heads, parent.mamba_num_heads),
                ("head_dim", self.mamba_head_dim, parent.mamba_head_dim),
                ("hidden", self.hidden_size, parent.hidden_size),
            )
            if value != own
        ]
        return "  ".join([*(f"{kind} {kinds.count(kind)}" for kind in (MAMBA, ATTENTION, MLP)), ffn, *others])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any], parent: ModelConfig, source: str) -> Candidate:
        """Read a candidate that a person may have edited.

        Raises:
            ValueError: it is not made of parts of ``parent``.
        """
        try:
            values = {field.name: content[field.name] for field in fields(cls)}
            candidate = cls(**{name: tuple(map(int, value)) if isinstance(value, list) else int(value) for name, value in values.items()})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: no candidate ({type(error).__name__}: {error})") from None
        if list(candidate.layers) != sorted(set(candidate.layers)) or not set(candidate.layers) <= set(range(parent.num_layers)):
            raise ValueError(f"{source}: layers must be numbers of the parent's {parent.num_layers} layers, ascending, each once")
        num_mlp = candidate.pattern(parent).count(MLP)
        if len(candidate.ffn_hidden_sizes) != num_mlp:
            raise ValueError(f"{source}: {num_mlp} MLP layers are kept, but {len(candidate.ffn_hidden_sizes)} ffn_hidden_sizes given")
        for name, value, limit in (
            ("hidden_size", candidate.hidden_size, parent.hidden_size),
            ("mamba_num_heads", candidate.mamba_num_heads, parent.mamba_num_heads),
            ("mamba_head_dim", candidate.mamba_head_dim, parent.mamba_head_dim),
            *(("ffn_hidden_sizes", width, parent.ffn_hidden_size) for width in candidate.ffn_hidden_sizes),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"{source}: {name} must lie between 1 and the parent's {limit}, got {value}")
        if candidate.mamba_num_heads % parent.mamba_num_groups:
            raise ValueError(
                f"{source}: mamba_num_heads={candidate.mamba_num_heads} is no multiple of the parent's "
                f"mamba_num_groups={parent.mamba_num_groups}; every group must keep as many heads"
            )
        return candidate
