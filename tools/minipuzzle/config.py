"""The options of a compression. Every field says what it is; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron_hybrid.config import (
    DataConfig,
    Fp8Config,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    ScheduleConfig,
    ValidationConfig,
)
from megatron_hybrid.config.load import load_section
from megatron_hybrid.config.quantities import TokenCount
from megatron_hybrid.config.schema import KernelsConfig
from megatron_hybrid.config.section import Section

Axis = Literal["layers", "ffn", "mamba", "hidden"]
Stage = Literal["score", "search", "prune", "distill", "report"]


class ScoreConfig(Section):
    """What is scored, and on how much text. Samples are the first of data.sources' stream."""

    axes: tuple[Axis, ...] = ("layers", "ffn")
    """layers: whole layers. ffn: MLP neurons. mamba: heads and head channels. hidden: embedding channels. The paper uses the first two."""
    layer_samples: int = Field(128, gt=0)
    """Samples for the importance of layers; each costs about layers / 2 forward passes."""
    width_samples: int = Field(1024, gt=0)
    """Samples for neurons, heads and channels; one forward pass each."""

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        if "layers" not in self.axes:
            raise ValueError(f"axes={list(self.axes)} leaves out layers, which every search needs")
        return self


class MemoryConfig(Section):
    """The target in memory, and what is held at what precision while the model generates."""

    limit_gib: float | None = Field(None, gt=0)
    """Most memory of a candidate, in GiB (2^30 bytes). Unset: no limit."""
    slack_gib: float | None = Field(None, gt=0)
    """Candidates that leave more than this under the limit are left out: they could keep more. Unset: none is."""
    weight_bits: float = Field(16.0, gt=0)
    """Bits of a weight, scales included (NVFP4: 4.5)."""
    kv_bits: float = Field(16.0, gt=0)
    """Bits of a value in the KV cache, scales included."""
    ssm_state_bits: float = Field(32.0, gt=0)
    """Bits of a value of the SSM state."""
    activation_bits: float = Field(16.0, gt=0)
    """Bits of an activation, and of the convolution's state."""
    context_tokens: TokenCount = Field(8192, gt=0)
    """Tokens of context per sequence."""
    batch_size: int = Field(1, gt=0)
    """Sequences at a time."""
    prefill_chunk_tokens: TokenCount = Field(4096, gt=0)
    """Tokens of a prompt that are read at a time."""

    @model_validator(mode="after")
    def _check(self) -> MemoryConfig:
        if self.slack_gib is not None and self.limit_gib is None:
            raise ValueError("slack_gib means something only under a limit; give limit_gib too")
        return self


class LatencyConfig(Section):
    """The target in time per decoded token, measured on the device at hand."""

    limit_ms: float | None = Field(None, gt=0)
    """Longest time of a decoding step, in milliseconds. Unset: no limit, and nothing is measured."""
    context_tokens: TokenCount = Field(8192, gt=0)
    """Tokens in the KV cache while the step is timed."""
    batch_size: int = Field(1, gt=0)
    """Sequences at a time."""
    repetitions: int = Field(20, gt=0)
    """Steps timed per layer kind; the median counts."""


class SearchConfig(Section):
    """The grid. Of each kind the best layers are kept, of each layer the best neurons."""

    attention: tuple[int, int] | None = None
    """Fewest and most attention layers. Unset: from none to all of the parent's."""
    mlp: tuple[int, int] | None = None
    """Fewest and most MLP layers."""
    mamba: tuple[int, int] | None = None
    """Fewest and most Mamba layers."""
    ffn_hidden_sizes: tuple[int, ...] = ()
    """Widths of the MLP layers, one for all of a candidate's. Empty: the parent's alone."""
    mamba_num_heads: tuple[int, ...] = ()
    """Mamba heads, multiples of the groups. Empty: the parent's alone."""
    mamba_head_dims: tuple[int, ...] = ()
    """Channels of a Mamba head. Empty: the parent's alone."""
    hidden_sizes: tuple[int, ...] = ()
    """Widths of the residual stream. Empty: the parent's alone."""
    memory: MemoryConfig = MemoryConfig()
    latency: LatencyConfig = LatencyConfig()
    solver: bool = True
    """Also find the exact optimum of the estimated damage, with a width for every MLP layer of its own (integer program)."""
    solver_time_limit_s: float = Field(60.0, gt=0)
    """Longest time of one integer program (one for each choice of widths that all layers share). Stopped there, the best so far counts."""
    num_evaluated: int = Field(130, gt=0)
    """Candidates of the grid, least estimated damage first, that are run on validation tokens."""
    num_tokens: TokenCount = Field(1_000_000, gt=0)
    """Validation tokens that candidates are ranked on."""
    rank_by: Literal["accuracy_and_agreement", "accuracy", "agreement", "loss"] = "accuracy_and_agreement"
    """Mean of next-token accuracy and greedy agreement with the parent, one of the two alone, or loss. Of equals, the lower loss first."""
    top_k: int = Field(3, gt=0)
    """Candidates that are pruned and distilled for a short while."""

    @field_validator("attention", "mlp", "mamba")
    @classmethod
    def _is_range(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 0 <= value[0] <= value[1]:
            raise ValueError(f"expected [fewest, most] with 0 <= fewest <= most, got {list(value)}")
        return value


class BatchConfig(Section):
    """How ranks cut their work, in every stage."""

    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(1, gt=0)
    """Samples per forward pass of one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Working precision of training and of every forward pass."""


class LayerLossConfig(Section):
    """Distillation between layers: residual streams of the parent and of the student, compared where both stand at the same place."""

    kind: Literal["mse", "cosine"] = "cosine"
    """mse: mean squared difference over the width. cosine: 1 - cosine, blind to length."""
    weight: float = Field(gt=0)
    """Weight of the layers' mean beside the distillation loss."""
    layers: tuple[int, ...] = ()
    """The parent's layers whose output is compared. One that the student lacks is compared with the student's stream at that place, after
    the last layer kept before it. Empty: all layers that the student keeps."""
    layer_weights: tuple[float, ...] = ()
    """Relative weight of each of ``layers``. Empty: the same for all."""

    @model_validator(mode="after")
    def _check(self) -> LayerLossConfig:
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers={list(self.layers)} must be numbers of the parent's layers, ascending, each once")
        if self.layer_weights and len(self.layer_weights) != len(self.layers):
            raise ValueError(f"{len(self.layer_weights)} layer_weights for {len(self.layers)} layers; give one for each, or none")
        if any(weight <= 0 for weight in self.layer_weights):
            raise ValueError(f"layer_weights={list(self.layer_weights)} must be above 0; leave out layers that shall not count")
        return self


class DistillConfig(Section):
    """Distillation of the candidates from the parent (forward KL on logits)."""

    short_tokens: TokenCount = Field(gt=0)
    """Tokens that each of the top candidates is distilled on."""
    long_tokens: TokenCount = Field(gt=0)
    """Tokens of the winner's run, which starts from the pruned weights anew."""
    temperature: float = Field(1.0, gt=0)
    """Both logits are divided by it."""
    lm_loss_weight: float = Field(0.0, ge=0)
    """Weight of the next-token loss beside the distillation loss."""
    hidden_loss_weight: float = Field(0.0, ge=0)
    """Weight of 1 - cosine between the last hidden states of student and teacher; they must have one width."""
    layer_loss: LayerLossConfig | None = None
    """Compare residual streams between layers too; needs one width and no pipeline stages. Unset: no."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    fp8: Fp8Config = Fp8Config()
    """Of the student's linears; the teacher runs in the working precision."""
    checkpoint_every_steps: int | None = Field(None, gt=0)
    """Steps between checkpoints. Unset: at the end, and on SIGTERM or SIGUSR1."""


class BaselineConfig(Section):
    """What the distilled model is compared with, on as many tokens as the long run."""

    scratch: bool = False
    """The same architecture, trained from random weights."""
    finetune: bool = False
    """The same pruned weights, trained on next tokens without a teacher."""
    finetune_optimizer: OptimizerConfig | None = None
    """Optimizer of the fine-tuning, which wants a lower rate than the parent's was. Unset: distill.optimizer."""
    scratch_optimizer: OptimizerConfig | None = None
    """Optimizer of the run from scratch, which bears a higher rate. Unset: distill.optimizer."""


class MiniPuzzleConfig(Section):
    """One compression."""

    work_dir: Path
    """Where every stage leaves its files."""
    parent: str
    """The model to compress: a run directory, one checkpoint in it, or a preset's name (which has no weights: search alone runs)."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the data order, of weights from scratch and of synthetic scores."""
    data: DataConfig | None = None
    """Text for scoring and distillation. Unset: the parent's own."""
    validation: ValidationConfig | None = None
    """Text that candidates are ranked on and results are measured on: all sources together. Unset: the parent's own."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout of scoring, ranking and distillation."""
    batch: BatchConfig | None = None
    """Batch of all stages; needed by all but a search without weights."""
    score: ScoreConfig = ScoreConfig()
    search: SearchConfig = SearchConfig()
    distill: DistillConfig | None = None
    """Needed by distill and run."""
    baselines: BaselineConfig = BaselineConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: KernelsConfig = KernelsConfig()
    runtime: RuntimeConfig = RuntimeConfig()


def load_minipuzzle(source: str | Path, overrides: Sequence[str] = ()) -> MiniPuzzleConfig:
    """Return the compression that a YAML file and overrides ("search.top_k=2") describe.

    Raises:
        ConfigError: the file cannot be read, or it is not valid; the message lists every problem.
    """
    return load_section(MiniPuzzleConfig, source, overrides)
