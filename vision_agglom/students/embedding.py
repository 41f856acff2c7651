"""From images to tokens: patches, cropped position embeddings (CPE, RADIO), one class token per teacher, registers."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.parameters import declare, normal
from vision_agglom.config.student import StudentConfig
from vision_agglom.randomness import generator_for
from vision_agglom.resample import bilinear_matrix, resize_positions, sample_grid
from vision_agglom.students.ops import VisionOps
from vision_agglom.students.sequence import ImageSequence
from vision_agglom.transfer import send

_LOWEST_SCALE = math.sqrt(0.1)
_LOWEST_ASPECT, _HIGHEST_ASPECT = math.log(3 / 4), math.log(4 / 3)


class TokenEmbedding(torch.nn.Module):
    """Patch embedding without bias, the position table, class and register tokens. Whole on every tensor rank."""

    def __init__(self, student: StudentConfig, num_prefix: int, config: TransformerConfig, ops: VisionOps, *, seed: int) -> None:
        super().__init__()
        self.student, self.seed, self.product, self.sequence_parallel = student, seed, ops.linear, config.sequence_parallel
        width, dtype, std = student.hidden_size, config.params_dtype, student.init_std
        self.patch_weight = torch.nn.Parameter(torch.empty(width, 3 * student.patch_size**2, dtype=dtype))
        self.position_table = torch.nn.Parameter(torch.empty(student.table_side**2, width, dtype=dtype))
        self.prefix_tokens = torch.nn.Parameter(torch.empty(num_prefix, width, dtype=dtype))
        for parameter in (self.patch_weight, self.position_table, self.prefix_tokens):
            declare(parameter, initializer=normal(std))
        # No parameters and no state: constants of the run's configuration.
        self.register_buffer("mean_C11", torch.tensor(student.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(student.std).view(3, 1, 1), persistent=False)

    def forward(self, images_BCHW: Tensor, sequence: ImageSequence, samples: np.ndarray | None) -> Tensor:
        """Tokens of RGB images in [0, 1].

        Args:
            images_BCHW: float32; height and width are multiples of the patch.
            sequence: what the blocks will be told of the tokens.
            samples: global indices of the images, which their position crops are drawn for; None for the fixed positions of evaluation.

        Returns:
            [padded length (/ tp under sequence parallelism), B, D].
        """
        dtype = self.patch_weight.dtype
        normalised_BCHW = ((images_BCHW - self.mean_C11) / self.std_C11).to(dtype)
        patches_BTD = self.product(cut_patches(normalised_BCHW, self.student.patch_size), self.patch_weight)
        patches_BTD = patches_BTD + self.positions(sequence, samples).to(dtype)
        prefix_BSD = self.prefix_tokens.expand(len(images_BCHW), -1, -1)
        tokens_LBD = torch.cat([prefix_BSD, patches_BTD], 1).transpose(0, 1)
        tokens_LBD = F.pad(tokens_LBD, (0, 0, 0, 0, 0, sequence.padded_length - sequence.length))
        if self.sequence_parallel:
            return scatter_to_sequence_parallel_region(tokens_LBD, group=get_tensor_model_parallel_group())
        return tokens_LBD.contiguous()

    def positions(self, sequence: ImageSequence, samples: np.ndarray | None) -> Tensor:
        """Position embeddings [B or 1, T, D], interpolated from the table in fp32."""
        side, device = self.student.table_side, self.position_table.device
        table_HWD = self.position_table.float().unflatten(0, (side, side))
        if samples is None:
            rows, columns = (send(matrix.float(), device) for matrix in fixed_window(sequence.grid, side))
            return sample_grid(table_HWD, rows, columns).flatten(0, 1)[None]
        crops_B4 = np.stack([draw_crop(self.seed, sequence.step, int(sample)) for sample in samples])
        matrices = (crop_matrix(crops_B4[:, axis], crops_B4[:, 2 + axis], count, side) for axis, count in enumerate(sequence.grid))
        rows, columns = (send(matrix.float(), device) for matrix in matrices)
        positions_BTD = sample_grid(table_HWD, rows, columns).flatten(1, 2)
        if self.student.position_dropout:
            kept = [float(self._keeps_position(sequence.step, int(sample))) for sample in samples]
            positions_BTD = positions_BTD * send(torch.tensor(kept), device)[:, None, None]
        return positions_BTD

    def _keeps_position(self, step: int, sample: int) -> bool:
        return generator_for(self.seed, "position dropout", step, sample).random() >= self.student.position_dropout


def cut_patches(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] to [B, rows x columns, C p p]: what a convolution of stride p sees, channel first inside a patch."""
    batch, channels, height, width = images_BCHW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch_size}; give multiples of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = images_BCHW.view(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def draw_crop(seed: int, step: int, sample: int) -> np.ndarray:
    """A sample's window into the position table: (top, left, height, width) as shares of the table.

    Scale uniform on [sqrt(0.1), 1], the logarithm of the aspect uniform on [log 3/4, log 4/3], place uniform in the room that is left.
    """
    generator = generator_for(seed, "position crop", step, sample)
    scale = generator.uniform(_LOWEST_SCALE, 1.0)
    aspect = math.exp(generator.uniform(_LOWEST_ASPECT, _HIGHEST_ASPECT))
    height, width = min(scale / aspect, 1.0), min(scale * aspect, 1.0)
    top, left = generator.random(2) * (1 - height, 1 - width)
    return np.array([top, left, height, width])


def crop_matrix(starts_B: np.ndarray, extents_B: np.ndarray, count: int, side: int) -> Tensor:
    """[B, count, side] weights that sample a window of the table evenly, its ends included (align_corners=True)."""
    shares_BN = starts_B[:, None] + extents_B[:, None] * np.linspace(0.0, 1.0, count)
    return bilinear_matrix(torch.from_numpy(shares_BN * (side - 1)), side)


def fixed_window(grid: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Row and column weights of evaluation: the table resized to a square of the longer side, of which the top left is taken."""
    longest = max(grid)
    matrix = bilinear_matrix(resize_positions(longest, side), side)
    return matrix[: grid[0]], matrix[: grid[1]]
