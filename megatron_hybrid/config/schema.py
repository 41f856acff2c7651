"""The options of a run. Every field says what it is; nothing here imports torch.

The tree is frozen: a run is decided once, before any process starts, and the same object is read by every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.float8 import Fp8Config
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.quantities import RunPosition, TokenCount, resolve_position
from megatron_hybrid.config.section import Section, require_divides
from megatron_hybrid.layout.float8 import DIMENSION_UNIT, plan_float8
from megatron_hybrid.layout.stages import plan_stages


class ParallelConfig(Section):
    """How ranks share the work: tensor x pipeline x data."""

    tensor: int = Field(1, gt=0)
    """Tensor-parallel ranks: heads, groups, FFN and vocabulary are split over them."""
    pipeline: int = Field(1, gt=0)
    """Pipeline-parallel ranks."""
    virtual_pipeline: int = Field(1, gt=0)
    """Model chunks per pipeline rank; above 1 the interleaved schedule runs."""
    data: int | None = Field(None, gt=0)
    """Data-parallel ranks. Unset: 1 when launched plainly, or whatever the ranks given by torchrun or srun leave."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor ranks along the sequence; needs tensor above 1."""
    stages: tuple[int, ...] | None = None
    """Layers per (virtual) stage, in model order. Unset: follow | in the pattern, or else balance the cost."""
    distributed_optimizer: bool = True
    """Shard optimizer state and fp32 masters over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Start gradient reductions during backward."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward; needs distributed_optimizer and overlap_grad_reduce."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none; the inside of each mixer and MLP; or whole layers, Mamba included."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel=true needs tensor above 1, got tensor=1; raise it or drop sequence_parallel")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(f"virtual_pipeline={self.virtual_pipeline} needs pipeline above 1, got pipeline=1")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather=true needs distributed_optimizer=true and overlap_grad_reduce=true")
        return self

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline


class TokenizerConfig(Section):
    """How text becomes tokens."""

    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """sentencepiece: a .model file. huggingface: a tokenizer.json, or a folder that transformers' AutoTokenizer reads."""
    path: Path
    """The tokenizer's file or folder."""
    eod_token: str | None = None
    """Token that ends a document. Unset: the tokenizer's own end token."""


class PhaseConfig(Section):
    """A stretch of the run with its own blend."""

    start: RunPosition = "0%"
    """Where the phase begins: a share of the run ("60%"), a token count ("9T"), or a count back from the end ("-380B")."""
    blend: dict[str, float] = Field(default_factory=dict)
    """Source name -> weight. Weights are shares of tokens and are normalised. Empty: each source by its size."""

    @model_validator(mode="after")
    def _check(self) -> PhaseConfig:
        for source, weight in self.blend.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"blend weight of {source!r} must be zero or more and finite, got {weight}")
        if self.blend and sum(self.blend.values()) == 0:
            raise ValueError("every blend weight is 0; give at least one source a positive weight")
        return self


class DataConfig(Section):
    """What the model reads."""

    sources: dict[str, Path] = Field(min_length=1)
    """Source name -> path prefix of a tokenised corpus (PREFIX.bin and PREFIX.idx)."""
    phases: tuple[PhaseConfig, ...] = (PhaseConfig(),)
    """Blends over the run, in order; the first starts at 0."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer that made the corpora. Its vocabulary is checked against the model's, and generation uses it."""
    sequence_length: int = Field(gt=0)
    """Tokens per training sample."""
    reset_at_documents: bool = False
    """Reset SSM and convolution state, and mask attention, at document boundaries inside a sample."""
    num_workers: int = Field(1, ge=0)
    """Threads that read ahead; 0 reads in the training thread."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.phases:
            raise ValueError("phases is empty; leave it out for one phase over all sources")
        if resolve_position(self.phases[0].start, 10**18) != 0:
            raise ValueError(f"the first phase must start at 0, got {self.phases[0].start!r}")
        for phase in self.phases:
            unknown = sorted(set(phase.blend) - set(self.sources))
            if unknown:
                raise ValueError(f"blend names {unknown}, which sources does not have (it has {sorted(self.sources)})")
        return self


class OptimizerConfig(Section):
    """AdamW with Megatron's decay rules: biases and one-dimensional parameters are not decayed."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the decay."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first-moment decay."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second-moment decay."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    clip_grad: float = Field(1.0, ge=0)
    """Global gradient-norm bound; 0 switches clipping off."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        return self


class ScheduleConfig(Section):
    """Learning rate over tokens."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: warm-up then half a cosine to min_lr. wsd: warm-up, constant, then decay_tokens of decay at the end."""
    warmup_tokens: TokenCount = Field(0, ge=0)
    """Tokens of linear warm-up."""
    decay_tokens: TokenCount | None = Field(None, gt=0)
    """cosine: tokens until min_lr, warm-up included (unset: the whole run). wsd: tokens of the final decay (required)."""
    wsd_decay: Literal["linear", "cosine", "minus_sqrt"] = "minus_sqrt"
    """Shape of WSD's final decay."""

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        if self.kind == "wsd" and self.decay_tokens is None:
            raise ValueError("schedule.kind=wsd needs schedule.decay_tokens: how many tokens the final decay takes")
        if self.kind == "constant" and self.decay_tokens is not None:
            raise ValueError("schedule.kind=constant takes no decay_tokens; drop it or choose cosine or wsd")
        if self.kind != "wsd" and self.wsd_decay != ScheduleConfig.model_fields["wsd_decay"].default:
            raise ValueError(f"wsd_decay={self.wsd_decay} is not read with kind={self.kind}; drop it or choose wsd")
        return self


class TrainConfig(Section):
    """How long and in what pieces."""

    steps: int = Field(gt=0)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(gt=0)
    """Samples per optimizer step over all ranks."""
    micro_batch_size: int = Field(1, gt=0)
    """Samples per forward pass of one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Working precision. bf16 keeps fp32 masters and moments; A_log, D and dt_bias are fp32 in either case."""
    exit_after_steps: int | None = Field(None, gt=0)
    """Save and stop after this many steps of this process, without shortening the schedule. Unset: run to the end."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        require_divides("micro_batch_size", self.micro_batch_size, "global_batch_size", self.global_batch_size)
        return self


class ValidationConfig(Section):
    """Loss on held-out text, per source."""

    sources: dict[str, Path] = Field(default_factory=dict)
    """Source name -> path prefix of a tokenised corpus. Empty: no validation."""
    every_steps: int = Field(100, gt=0)
    """Steps between validations; one more runs at the end."""
    num_batches: int = Field(8, gt=0)
    """Global batches per source and validation, the same ones each time."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every_steps: int | None = Field(None, gt=0)
    """Steps between saves. Unset: only at the end, and on SIGTERM or SIGUSR1."""
    keep_last: int | None = Field(2, gt=0)
    """Complete checkpoints kept; older ones are deleted. Unset: all."""
    asynchronous: bool = False
    """Write in the background while training goes on."""
    resume: bool = True
    """Continue from the run directory's newest sound checkpoint when there is one."""
    initialize_from: Path | None = None
    """A checkpoint whose weights (only) a new run starts from."""


class LoggingConfig(Section):
    """What a run says while it works. metrics.jsonl is always written."""

    every_steps: int = Field(1, gt=0)
    """Steps between log lines."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run directory."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project; needs wandb installed."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak TFLOP/s of one device, for MFU. Unset: known GPUs from a table, none on a CPU."""


class KernelsConfig(Section):
    """Which implementation of each operation a run uses (docs/kernels.md). auto: the fastest there is for the device and precision. A run's
    start says which it never calls."""

    mamba_core: Literal["auto", "reference", "cpu", "triton", "mamba_ssm"] = "auto"
    """Convolution, scan and gated norm of a Mamba-2 layer in one, as training runs them."""
    ssd: Literal["auto", "reference", "cpu", "triton", "mamba_ssm"] = "auto"
    """The scan alone, as prefilling a prompt runs it."""
    causal_conv1d: Literal["auto", "reference", "cpu", "triton", "causal_conv1d"] = "auto"
    """The convolution alone, as prefilling a prompt runs it."""
    gated_rms_norm: Literal["auto", "reference", "cpu", "triton", "mamba_ssm"] = "auto"
    """The gated norm alone, as prefilling a prompt runs it."""
    rms_norm: Literal["auto", "reference", "cpu", "triton", "transformer_engine"] = "auto"
    """The norm in front of every layer."""
    squared_relu: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """The MLP's activation, where not both of its linears are in float8."""
    linear: Literal["auto", "reference", "cpu", "cublas", "cublaslt", "transformer_engine"] = "auto"
    """Products of the layers' linears in the working precision; all GPU versions add weight gradients in fp32 within
    the product, cublaslt by algorithms that can be pinned for each shape."""
    attention: Literal["auto", "reference", "cpu", "sdpa", "cudnn", "transformer_engine"] = "auto"
    """Causal attention."""
    embedding: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Token lookup."""
    linear_cross_entropy: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Output layer and loss in one."""


class RuntimeConfig(Section):
    """Where the run executes."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where it is there, the CPU otherwise."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest wait in a collective before the run is ended with an error; for the first meeting of the ranks at most 300 s of it."""
    threads_per_rank: int | None = Field(None, gt=0)
    """CPU threads of one rank. Unset: the host's cores shared among its ranks."""
    cuda_graphs: Literal["auto", "on", "off"] = "auto"
    """Launch a micro-batch's forward and backward as one CUDA graph. auto: on a GPU, where the layout lets it (docs/kernels.md)."""
    deterministic: bool = True
    """Use only deterministic algorithms, so that a resumed run repeats bit for bit."""


class RunConfig(Section):
    """One run."""

    run_dir: Path
    """Where the run keeps its resolved configuration, metrics, checkpoints and pictures."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the initial weights and of the data order."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    fp8: Fp8Config = Fp8Config()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: KernelsConfig = KernelsConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of one sample: what the schedule counts for it."""
        return self.data.sequence_length

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step consumes."""
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def total_samples(self) -> int:
        """Samples of the whole run."""
        return self.train.steps * self.train.global_batch_size

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train.steps * self.tokens_per_step

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.steps

    def steps_left(self, samples: int) -> int:
        """Optimizer steps from a data position to the end of the run."""
        return -(-(self.total_samples - samples) // self.train.global_batch_size)

    def check_data_ranks(self, data_size: int) -> None:
        """Refuse a number of data-parallel ranks that the batch does not divide over.

        Raises:
            ValueError: the global batch is no whole number of passes, or interleaved stages cannot take turns with its micro-batches.
        """
        parallel, train = self.parallel, self.train
        per_pass = train.micro_batch_size * data_size
        if train.global_batch_size % per_pass:
            raise ValueError(
                f"train.global_batch_size={train.global_batch_size} does not divide by train.micro_batch_size={train.micro_batch_size} x "
                f"{data_size} data-parallel rank(s) = {per_pass}; make it a multiple of {per_pass}, or start other ranks"
            )
        num_microbatches = train.global_batch_size // per_pass
        if parallel.virtual_pipeline > 1 and num_microbatches % parallel.pipeline:
            raise ValueError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} interleaves the microbatches in rounds of parallel.pipeline="
                f"{parallel.pipeline}, but a rank has {num_microbatches} per step "
                f"(train.global_batch_size={train.global_batch_size} / {per_pass}); "
                f"make train.global_batch_size a multiple of {per_pass * parallel.pipeline}"
            )

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.run_dir == Path():
            raise ValueError("run_dir is empty; name a directory of the run's own")
        check_schedule(self.schedule, self.optimizer, self.total_tokens)
        starts = [resolve_position(phase.start, self.total_tokens) for phase in self.data.phases]
        if starts != sorted(set(starts)):
            written = [phase.start for phase in self.data.phases]
            raise ValueError(f"phases must start one after another; {written} of {self.total_tokens} tokens begin at {starts}")
        check_layout(self.model, self.parallel, self.data.sequence_length)
        if self.parallel.data is not None:
            per_pass = self.parallel.data * self.train.micro_batch_size
            require_divides("parallel.data x train.micro_batch_size", per_pass, "train.global_batch_size", self.train.global_batch_size)
        if self.fp8.recipe != "off":
            self._check_float8()
        if self.kernels.attention == "transformer_engine" and self.data.reset_at_documents:
            raise ValueError(
                "kernels.attention=transformer_engine takes no mask, and data.reset_at_documents=true keeps documents apart by one; "
                "set it to false, or kernels.attention to auto or sdpa"
            )
        return self

    def _check_float8(self) -> None:
        plan_float8(self.model, self.parallel.tensor, self.fp8)
        num_tokens = self.data.sequence_length * self.train.micro_batch_size
        if num_tokens % DIMENSION_UNIT:
            raise ValueError(
                f"data.sequence_length x train.micro_batch_size={num_tokens} is no multiple of {DIMENSION_UNIT}, "
                "which float8 products need; change one of them, or set 'fp8={recipe: off}'"
            )


def check_layout(model: ModelConfig, parallel: ParallelConfig, sequence_length: int) -> None:
    """Refuse a layout that the model or the sequence does not divide into.

    Raises:
        ValueError: a split dimension or the sequence does not divide, or the stages do not fit the layers.
    """
    _check_tensor_split(model, parallel.tensor)
    if parallel.sequence_parallel:
        require_divides("parallel.tensor", parallel.tensor, "data.sequence_length", sequence_length)
    plan_stages(model, parallel, sequence_length)


def _check_tensor_split(model: ModelConfig, tensor: int) -> None:
    """Every split dimension must divide by the tensor ranks (facts of the mixer: heads and groups both split)."""
    dimensions = {"padded vocabulary": model.padded_vocab_size}
    if "M" in model.pattern:
        dimensions |= {"model.mamba_num_heads": model.mamba_num_heads, "model.mamba_num_groups": model.mamba_num_groups}
    if "*" in model.pattern:
        dimensions |= {"model.num_attention_heads": model.num_attention_heads, "model.num_kv_heads": model.num_kv_heads}
    for width in model.ffn_hidden_sizes:
        require_divides("parallel.tensor", tensor, "model.ffn_hidden_size", width)
    for name, size in dimensions.items():
        require_divides("parallel.tensor", tensor, name, size)


def check_schedule(schedule: ScheduleConfig, optimizer: OptimizerConfig, total_tokens: int) -> None:
    """Refuse a schedule that does not fit into a run of ``total_tokens``, or that leaves an option unread.

    Raises:
        ValueError: warm-up and decay overlap or do not fit; or the rate never falls to the minimum asked for.
    """
    if schedule.warmup_tokens > total_tokens:
        raise ValueError(f"schedule.warmup_tokens={schedule.warmup_tokens} is longer than the run of {total_tokens} tokens; shorten it")
    if schedule.kind == "wsd" and schedule.warmup_tokens + schedule.decay_tokens > total_tokens:
        raise ValueError(
            f"schedule.warmup_tokens={schedule.warmup_tokens} and schedule.decay_tokens={schedule.decay_tokens} do not fit into a run of "
            f"{total_tokens} tokens; shorten one of them"
        )
    if schedule.kind == "cosine" and schedule.decay_tokens is not None and schedule.decay_tokens <= schedule.warmup_tokens:
        raise ValueError(
            f"schedule.decay_tokens={schedule.decay_tokens} includes the warm-up and must exceed warmup_tokens={schedule.warmup_tokens}"
        )
    if schedule.kind == "constant" and optimizer.min_lr:
        raise ValueError(f"optimizer.min_lr={optimizer.min_lr} is not read with schedule.kind=constant; drop it or choose cosine or wsd")
