"""What a run is told: models read from TOML, overridden by dotted flags, checked before anything loads."""

from pellucid.config.help import help_text
from pellucid.config.load import differences, dump_toml, load_config, read_toml, validate
from pellucid.config.schema import (
    AlgoConfig,
    DataConfig,
    GenerateConfig,
    LearnConfig,
    ModelsConfig,
    NewModelConfig,
    OptimizerConfig,
    PPOConfig,
    PPOEvalConfig,
    QuickstartConfig,
    RewardConfig,
    RMConfig,
    RolloutConfig,
    RunConfig,
    Section,
    SFTConfig,
    SupervisedConfig,
)

__all__ = [
    "AlgoConfig",
    "DataConfig",
    "GenerateConfig",
    "LearnConfig",
    "ModelsConfig",
    "NewModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOEvalConfig",
    "QuickstartConfig",
    "RMConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "SupervisedConfig",
    "differences",
    "dump_toml",
    "help_text",
    "load_config",
    "read_toml",
    "validate",
]
