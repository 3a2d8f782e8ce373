"""What a run is told: models read from TOML, overridden by dotted flags, checked before anything loads."""

from pellucid.config.gym import EnvConfig, GymAlgoConfig, GymConfig, GymRunConfig
from pellucid.config.help import help_text
from pellucid.config.load import differences, dump_toml, load_config, read_toml, to_tree, validate
from pellucid.config.schema import (
    AlgoConfig,
    GenerateConfig,
    ModelsConfig,
    PPOConfig,
    PPOEvalConfig,
    QuickstartConfig,
    RewardConfig,
    RMConfig,
    RolloutConfig,
    SFTConfig,
    SupervisedConfig,
    TraceConfig,
)
from pellucid.config.sections import (
    DataConfig,
    LearnConfig,
    NewModelConfig,
    OptimizerConfig,
    PassConfig,
    RunConfig,
    Section,
)

__all__ = [
    "AlgoConfig",
    "DataConfig",
    "EnvConfig",
    "GenerateConfig",
    "GymAlgoConfig",
    "GymConfig",
    "GymRunConfig",
    "LearnConfig",
    "ModelsConfig",
    "NewModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PPOEvalConfig",
    "PassConfig",
    "QuickstartConfig",
    "RMConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SFTConfig",
    "Section",
    "SupervisedConfig",
    "TraceConfig",
    "differences",
    "dump_toml",
    "help_text",
    "load_config",
    "read_toml",
    "to_tree",
    "validate",
]
