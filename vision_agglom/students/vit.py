"""The student model: embedding, blocks, heads; each pipeline stage builds the part it holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import declare, ones
from vision_agglom.config.student import StudentConfig
from vision_agglom.heads import HeadShape, TeacherHeads
from vision_agglom.students.embedding import TokenEmbedding
from vision_agglom.students.layers import Block, zeros
from vision_agglom.students.ops import VisionOps
from vision_agglom.students.sequence import ImageSequence


@dataclass(frozen=True)
class BackboneFeatures:
    """What the student's last block says."""

    prefix_BSD: Tensor
    """Class tokens in the order of the teachers, then registers."""
    patches_BTD: Tensor
    """Row-major."""
    grid: tuple[int, int]


class StudentModel(MegatronModule):
    """One stage's part of the student."""

    def __init__(
        self,
        student: StudentConfig,
        heads: Sequence[HeadShape],
        num_prefix: int,
        config: TransformerConfig,
        ops: VisionOps,
        *,
        seed: int,
        layer_range: tuple[int, int],
        is_first_stage: bool,
        is_last_stage: bool,
        recompute: Literal["none", "selective", "full"] = "none",
        num_uncertainties: int = 0,
        length_multiple: int = 1,
    ) -> None:
        super().__init__(config)
        # megatron-core's schedules and gradient finalisation read these two.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.student, self.num_prefix, self.length_multiple = student, num_prefix, length_multiple
        self.first_layer, end = layer_range
        self.recompute_blocks = recompute == "full"
        self.input_tensor: Tensor | None = None
        self.pre_process, self.post_process = is_first_stage, is_last_stage
        if is_first_stage:
            self.embedding = TokenEmbedding(student, num_prefix, config, ops, seed=seed)
        self.blocks = torch.nn.ModuleList(
            Block(student, config, ops, is_global=student.is_global_block(index), recompute_core=recompute == "selective")
            for index in range(self.first_layer, end)
        )
        if is_last_stage:
            self.final_norm = FinalNorm(student.hidden_size, config, ops) if student.final_norm else None
            self.heads = TeacherHeads(heads, student.hidden_size, config, ops, num_uncertainties=num_uncertainties)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous stage's output; called by megatron-core's pipeline schedules."""
        (self.input_tensor,) = input_tensor

    def named_global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters by their name in the whole model: the stage's block 0 may be the model's block 12."""
        for name, parameter in self.named_parameters():
            yield self.global_name(name), parameter

    def global_name(self, name: str) -> str:
        """A name in this stage, as it is in the whole model."""
        if not name.startswith("blocks."):
            return name
        _, index, rest = name.split(".", 2)
        return f"blocks.{int(index) + self.first_layer}.{rest}"

    def sequence_of(self, images_BCHW: Tensor, *, step: int, window: int | None = None) -> ImageSequence:
        """What the blocks need to know of these images' tokens."""
        patch = self.student.patch_size
        grid = (images_BCHW.shape[2] // patch, images_BCHW.shape[3] // patch)
        return ImageSequence(self.num_prefix, grid, self.length_multiple, window, step)

    def forward(
        self, images_BCHW: Tensor, *, samples: np.ndarray | None = None, step: int = 0, window: int | None = None
    ) -> Tensor | BackboneFeatures:
        """Run this stage.

        Args:
            images_BCHW: RGB in [0, 1], float32; read by the first stage, the others need its shape alone.
            samples: global indices of the images while training; None for the positions of evaluation.
            step: the optimizer step, for what is drawn per step.
            window: side of the windows of windowed blocks in patches; None for global attention everywhere.

        Returns:
            Before the last stage the residual stream [L or L/tp, B, D]; on the last the features, whole on every tensor rank.
        """
        sequence = self.sequence_of(images_BCHW, step=step, window=window)
        hidden_LBD = self.embedding(images_BCHW, sequence, samples) if self.pre_process else self.input_tensor
        for block in self.blocks:
            if self.recompute_blocks and self.training:
                hidden_LBD = tensor_parallel.checkpoint(lambda hidden, block=block: block(hidden, sequence), False, hidden_LBD)
            else:
                hidden_LBD = block(hidden_LBD, sequence)
        if not self.post_process:
            return hidden_LBD
        if self.final_norm is not None:
            hidden_LBD = self.final_norm(hidden_LBD)
        return self._split(hidden_LBD, sequence)

    def _split(self, hidden_LBD: Tensor, sequence: ImageSequence) -> BackboneFeatures:
        if self.config.sequence_parallel:
            # Every tensor rank computes the same loss from here on: each takes its own part of the one gradient.
            group = get_tensor_model_parallel_group()
            hidden_LBD = gather_from_sequence_parallel_region(hidden_LBD, tensor_parallel_output_grad=False, group=group)
        hidden_BLD = hidden_LBD[: sequence.length].transpose(0, 1)
        prefix_BSD, patches_BTD = hidden_BLD.split([self.num_prefix, sequence.length - self.num_prefix], dim=1)
        return BackboneFeatures(prefix_BSD, patches_BTD, sequence.grid)


class FinalNorm(torch.nn.Module):
    """LayerNorm over the residual stream."""

    def __init__(self, size: int, config: TransformerConfig, ops: VisionOps) -> None:
        super().__init__()
        self.layer_norm, self.eps = ops.layer_norm, config.layernorm_epsilon
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(size, dtype=config.params_dtype))
        declare(self.weight, initializer=ones, sequence_parallel=config.sequence_parallel)
        declare(self.bias, initializer=zeros, sequence_parallel=config.sequence_parallel)

    def forward(self, hidden_LBD: Tensor) -> Tensor:
        """Map [..., size] to [..., size]."""
        return self.layer_norm(hidden_LBD, self.weight, self.bias, self.eps)
