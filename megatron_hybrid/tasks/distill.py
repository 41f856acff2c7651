"""Distillation as a task: a student learns the next-token distribution of a frozen teacher (forward KL on logits).

Both stand on the same ranks, each cut into pipeline stages of its own. Stages hand on one tensor, the student's residual stream beside
the teacher's, so that megatron-core's schedules move both; no gradient comes back for the teacher's part. The loss is made on the last
stage from the two last hidden states, chunk by chunk, without gathering the vocabulary (``ops/distillation.py``); residual streams between
layers can be compared too, where there are no pipeline stages (``layer_losses.py``).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor

from megatron_hybrid.checkpoint import read_header
from megatron_hybrid.checkpoint.manifest import MANIFEST
from megatron_hybrid.config import Fp8Config, ModelConfig, RunConfig
from megatron_hybrid.config.schema import check_layout
from megatron_hybrid.data.loader import MicroBatch
from megatron_hybrid.data.stream import require_same_data
from megatron_hybrid.layers.linear import whole_sequence
from megatron_hybrid.layers.specs import choose_implementations
from megatron_hybrid.layout.flops import training_flops_per_token
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.ops.hidden_states import cosine_distance
from megatron_hybrid.ops.registry import select
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from megatron_hybrid.tasks.frozen import load_frozen_chunks
from megatron_hybrid.tasks.layer_losses import LayerLossOptions, StreamTap, check_layer_losses, layer_loss
from megatron_hybrid.tasks.pretrain import Pretraining
from megatron_hybrid.train.task import LossFunction, Metrics


@dataclass(frozen=True)
class DistillOptions:
    """Who teaches, and what the loss is made of."""

    teacher: Path
    """Its checkpoint."""
    temperature: float = 1.0
    """Both logits are divided by it; the loss is not multiplied by its square."""
    lm_loss_weight: float = 0.0
    """Weight of the student's next-token loss beside the distillation loss."""
    hidden_loss_weight: float = 0.0
    """Weight of 1 - cosine between the last hidden states (after the final norm)."""
    layer_loss: LayerLossOptions | None = None
    """Residual streams that are compared after layers in between."""


class Distillation(Pretraining):
    """Trains a HybridModel on tokenised text to say what a teacher says (a ``train.task.Task``).

    Args:
        run: the student's.
        options: teacher and loss.
        config: megatron-core's settings for the student's layers; the trainer takes ``pipeline_config`` instead.
        substrate: this rank.

    Raises:
        ValueError: at construction, when a corpus or the tokenizer does not fit the run, or the teacher does not fit the student or the
            layout.
    """

    # Not tried yet with two models in one graph.
    is_capturable = False

    def __init__(self, run: RunConfig, options: DistillOptions, config: TransformerConfig, substrate: Substrate) -> None:
        super().__init__(run, config, substrate)
        self.options = options
        self.teacher_run = _teacher_run(run, options)
        teacher = self.teacher_run.model
        # A stage's output is the student's stream beside the teacher's; schedules make their buffers by this width.
        self.pipeline_config = copy.copy(config)
        self.pipeline_config.hidden_size = run.model.hidden_size + teacher.hidden_size
        self.flops_per_sample += run.data.sequence_length * training_flops_per_token(teacher, run.data.sequence_length) / 3
        self.metric_names = ("loss", "kl", *_extra_terms(options))

    def build_chunks(self) -> list[StudentAndTeacher]:
        """This rank's parts of the student, each with the teacher's that stands on the same stage."""
        teacher_config = build_transformer_config(self.teacher_run, self.substrate)
        teachers = load_frozen_chunks(self.teacher_run, self.options.teacher, teacher_config, self.substrate)
        students = build_chunks(self.run, self.config, self.substrate)
        # As the student's own loss is chosen: both add to the output layer's gradient, in the same way.
        chosen = choose_implementations(self.substrate.device, self.config.params_dtype, self.run.kernels)
        kl_divergence = select("linear_kl_divergence", chosen["linear_cross_entropy"])
        return [
            StudentAndTeacher(student, teacher, self.pipeline_config, self.options, kl_divergence)
            for student, teacher in zip(students, teachers, strict=True)
        ]

    def forward_step(self, micro_batches: Iterator[MicroBatch], chunk: StudentAndTeacher) -> tuple[Tensor, LossFunction]:
        """The distillation loss of the next micro-batch, summed over tokens."""
        batch = next(micro_batches)
        tokens_BL, labels_BL, loss_mask_BL, segment_ids_BL = (
            tensor.to(self.substrate.device, non_blocking=True)
            for tensor in (batch.tokens, batch.labels, batch.loss_mask, batch.segment_ids)
        )
        output = chunk(tokens_BL, labels_BL, loss_mask_BL, segment_ids_BL if self.run.data.reset_at_documents else None)
        return output, partial(_describe_losses, self.metric_names, loss_mask_BL)

    def data_fingerprint(self) -> dict[str, Any]:
        """The stream's, and who teaches how: another teacher would be another run."""
        options = asdict(self.options) | {"teacher": hashlib.blake2b((self.options.teacher / MANIFEST).read_bytes()).hexdigest()[:16]}
        # As a checkpoint's header gives it back: lists for tuples.
        return {**self.stream.fingerprint(), "distillation": json.loads(json.dumps(options))}

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Refuse another stream, teacher or loss, naming what differs."""
        require_same_data(saved, self.data_fingerprint())


class StudentAndTeacher(MegatronModule):
    """One stage of both models. Its parameters are the student's alone."""

    def __init__(
        self, student: HybridModel, teacher: HybridModel, config: TransformerConfig, options: DistillOptions, kl_divergence: Callable
    ) -> None:
        super().__init__(config)
        self.student, self.options, self.kl_divergence = student, options, kl_divergence
        # Held in a tuple, the teacher is no submodule: it is not trained, saved, wrapped or put into training mode.
        self._teacher = (teacher,)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process, self.post_process = student.pre_process, student.post_process

    @property
    def teacher(self) -> HybridModel:
        """The frozen one."""
        return self._teacher[0]

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Take the previous stage's output, [L or L/tp, B, student's D + teacher's D]; called by megatron-core's schedules."""
        (hidden_LBX,) = input_tensor
        own = self.student.config.hidden_size
        student_LBD, teacher_LBE = (None, None) if hidden_LBX is None else (hidden_LBX[..., :own], hidden_LBX[..., own:].detach())
        self.student.set_input_tensor([student_LBD])
        self.teacher.set_input_tensor([teacher_LBE])

    def named_global_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The student's parameters by their names in the whole student."""
        return self.student.named_global_parameters()

    def forward(self, tokens_BL: Tensor, labels_BL: Tensor, loss_mask_BL: Tensor, segment_ids_BL: Tensor | None) -> Tensor:
        """Run both stages.

        Args:
            tokens_BL: int64 token ids.
            labels_BL: int64 ids to predict; only a next-token term reads them.
            loss_mask_BL: fp32 weight of each token's loss.
            segment_ids_BL: int32 document numbers, when documents are kept apart.

        Returns:
            Before the last stage both residual streams [L or L/tp, B, student's D + teacher's D]. On the last, fp32 sums over tokens: the
            loss, which carries the gradient, then its terms, in the order of the task's metric names.
        """
        length = tokens_BL.shape[1]
        pairs = () if self.options.layer_loss is None else self.options.layer_loss.pairs
        teacher_tap, student_tap = StreamTap(pair.teacher for pair in pairs), StreamTap(pair.student for pair in pairs)
        with torch.no_grad():
            sequence = self.teacher.describe_sequence(length, segment_ids_BL)
            teacher_LBE = self.teacher.run_layers(tokens_BL, sequence, after_layer=teacher_tap)
        sequence = self.student.describe_sequence(length, segment_ids_BL)
        student_LBD = self.student.run_layers(tokens_BL, sequence, after_layer=student_tap)
        if not self.post_process:
            return torch.cat((student_LBD, teacher_LBE), dim=-1)
        return self._losses(student_LBD, teacher_LBE, student_tap.streams, teacher_tap.streams, labels_BL, loss_mask_BL)

    def _losses(
        self,
        student_LBD: Tensor,
        teacher_LBE: Tensor,
        student_streams: dict[int, Tensor],
        teacher_streams: dict[int, Tensor],
        labels_BL: Tensor,
        loss_mask_BL: Tensor,
    ) -> Tensor:
        options, head = self.options, self.student.output_layer
        whole_LBD = whole_sequence(student_LBD, head.sequence_parallel)
        whole_LBE = whole_sequence(teacher_LBE, head.sequence_parallel)
        kl, _ = self.kl_divergence(
            whole_LBD,
            head.weight,
            whole_LBE,
            self.teacher.output_layer.weight,
            loss_mask_BL.t(),
            vocab_size=head.vocab_size,
            temperature=options.temperature,
            group=get_tensor_model_parallel_group(),
        )
        total, terms = kl, [kl]
        if options.lm_loss_weight:
            # The weight enters with the mask: gradients are formed in the forward, and the sum must come back with gradient 1.
            weighted = head.loss_sum(student_LBD, labels_BL, options.lm_loss_weight * loss_mask_BL)
            total = total + weighted
            terms.append(weighted / options.lm_loss_weight)
        if options.hidden_loss_weight:
            terms.append(_cosine_loss(whole_LBD, whole_LBE, loss_mask_BL.t()))
            total = total + options.hidden_loss_weight * terms[-1]
        if options.layer_loss is not None:
            terms.append(
                layer_loss(
                    options.layer_loss,
                    student_streams,
                    teacher_streams,
                    loss_mask_BL.t(),
                    get_tensor_model_parallel_group(),
                    head.sequence_parallel,
                )
            )
            total = total + options.layer_loss.weight * terms[-1]
        return torch.stack([total, *(term.detach() for term in terms)])


def _cosine_loss(student_LBD: Tensor, teacher_LBD: Tensor, weights_LB: Tensor) -> Tensor:
    """1 - cosine, summed over tokens with weights. Every tensor rank computes all of it, and the ranks' gradients will be summed."""
    whole = (cosine_distance(student_LBD, teacher_LBD) * weights_LB).sum()
    share = whole / get_tensor_model_parallel_group().size()
    return share + (whole - share).detach()


def _extra_terms(options: DistillOptions) -> tuple[str, ...]:
    terms = {"lm_loss": options.lm_loss_weight, "hidden": options.hidden_loss_weight, "layers": options.layer_loss is not None}
    return tuple(name for name, is_there in terms.items() if is_there)


def _teacher_run(run: RunConfig, options: DistillOptions) -> RunConfig:
    """The student's run with the teacher's model; its stages are balanced by themselves."""
    teacher, student = ModelConfig.model_validate(read_header(options.teacher)["model"]), run.model
    if (teacher.vocab_size, teacher.padded_vocab_size) != (student.vocab_size, student.padded_vocab_size):
        raise ValueError(
            f"the teacher {options.teacher} predicts {teacher.vocab_size} tokens (padded: {teacher.padded_vocab_size}), the student "
            f"{student.vocab_size} (padded: {student.padded_vocab_size}): they must have one tokenizer and one padding (vocab_divisible_by)"
        )
    if options.hidden_loss_weight and teacher.hidden_size != student.hidden_size:
        raise ValueError(
            f"hidden_loss_weight={options.hidden_loss_weight} compares hidden states, but the teacher's are {teacher.hidden_size} wide and "
            f"the student's {student.hidden_size}; set it to 0"
        )
    if options.layer_loss is not None:
        check_layer_losses(options.layer_loss, student, teacher, run.parallel)
    parallel = run.parallel.model_copy(update={"stages": None})
    check_layout(teacher, parallel, run.data.sequence_length)
    return run.model_copy(update={"model": teacher, "parallel": parallel, "fp8": Fp8Config()})


def _describe_losses(names: tuple[str, ...], loss_mask_BL: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """The schedule's (sum, token count, metrics); runs on the last stage."""
    num_tokens = loss_mask_BL.sum()
    metrics = {name: torch.stack([value, num_tokens]) for name, value in zip(names, sums.detach(), strict=True)}
    # A copy: the schedule frees what a stage returns, which a view does not allow.
    return sums[0].clone(), num_tokens.int(), metrics
