"""What a run is: one typed, frozen tree of documented options, read from YAML and dotted overrides."""

from megatron_hybrid.config.float8 import DelayedScalingConfig, Fp8Config
from megatron_hybrid.config.load import ConfigError, dump_config, load_config
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.schema import (
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PhaseConfig,
    RunConfig,
    RuntimeConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DelayedScalingConfig",
    "Fp8Config",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScheduleConfig",
    "TokenizerConfig",
    "TrainConfig",
    "ValidationConfig",
    "dump_config",
    "load_config",
]
