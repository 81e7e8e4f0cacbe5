"""Post-training that survives the next fine-tuning. `frpo.api` describes the Python interface.

Names are imported when they are first used: `import frpo` loads neither torch nor an engine.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from frpo.api import (
        Result,
        Steps,
        evaluate,
        finetune,
        load_recipe,
        retention,
        steps,
        train,
        train_reward_model,
    )
    from frpo.config.finetune import FinetuneEvaluateSection as FinetuneEvaluate
    from frpo.config.finetune import FinetuneRecipe
    from frpo.config.finetune import FinetuneRunSection as FinetuneRun
    from frpo.config.finetune import ReferenceSection as Reference
    from frpo.config.learner import LearnerSection as Learner
    from frpo.config.model import LoraSection as Lora
    from frpo.config.model import ModelSection as Model
    from frpo.config.model import TinyModelSection as TinyModel
    from frpo.config.objective import ObjectiveSection as Objective
    from frpo.config.placement import PlacementSection as Placement
    from frpo.config.preference import PreferenceDataSection as PreferenceData
    from frpo.config.preference import RewardModelRecipe
    from frpo.config.retention import RetentionRecipe
    from frpo.config.rollout import RolloutSection as Rollout
    from frpo.config.rollout import WeightSyncSection as WeightSync
    from frpo.config.sections import ChecksSection as Checks
    from frpo.config.sections import DataSection as Data
    from frpo.config.sections import EvaluateSection as Evaluate
    from frpo.config.sections import Recipe
    from frpo.config.sections import RewardSection as Reward
    from frpo.config.sections import RunSection as Run
    from frpo.config.sections import TelemetrySection as Telemetry
    from frpo.config.supervised import AuxiliarySection as Auxiliary
    from frpo.config.supervised import SupervisedDataSection as SupervisedData
    from frpo.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        EngineError,
        FrpoError,
        InvariantError,
        ModelError,
        RewardError,
        RolloutHookError,
    )
    from frpo.objectives.cispo import CISPO
    from frpo.objectives.clip import Clip
    from frpo.objectives.constraint import Constraint
    from frpo.objectives.correction import RolloutCorrection
    from frpo.objectives.csft import CSFT, CSFTPA
    from frpo.objectives.frpo import FRPO
    from frpo.objectives.group import GRPO, RLOO, DrGRPO
    from frpo.objectives.gspo import GSPO
    from frpo.objectives.kl_control import KLControl
    from frpo.objectives.preference import BradleyTerry, Cost
    from frpo.objectives.reinforce import Reinforce
    from frpo.objectives.scalarise import GDPO, RVPO
    from frpo.objectives.supervised import KLSFT, SFT

_PLACES = {
    "frpo.api": ("Result", "Steps", "evaluate", "finetune", "load_recipe", "retention", "steps", "train",
                 "train_reward_model"),
    "frpo.config.finetune": (
        "FinetuneRecipe", "FinetuneRunSection", "FinetuneEvaluateSection", "ReferenceSection"),
    "frpo.config.learner": ("LearnerSection",),
    "frpo.config.model": ("LoraSection", "ModelSection", "TinyModelSection"),
    "frpo.config.objective": ("ObjectiveSection",),
    "frpo.config.placement": ("PlacementSection",),
    "frpo.config.preference": ("PreferenceDataSection", "RewardModelRecipe"),
    "frpo.config.retention": ("RetentionRecipe",),
    "frpo.config.rollout": ("RolloutSection", "WeightSyncSection"),
    "frpo.config.sections": (
        "Recipe", "ChecksSection", "DataSection", "EvaluateSection", "RewardSection", "RunSection",
        "TelemetrySection"),
    "frpo.config.supervised": ("AuxiliarySection", "SupervisedDataSection"),
    "frpo.errors": ("CheckpointError", "ConfigError", "DataError", "EngineError", "FrpoError", "InvariantError",
                    "ModelError", "RewardError", "RolloutHookError"),
    "frpo.objectives.cispo": ("CISPO",),
    "frpo.objectives.clip": ("Clip",),
    "frpo.objectives.constraint": ("Constraint",),
    "frpo.objectives.correction": ("RolloutCorrection",),
    "frpo.objectives.csft": ("CSFT", "CSFTPA"),
    "frpo.objectives.frpo": ("FRPO",),
    "frpo.objectives.group": ("GRPO", "RLOO", "DrGRPO"),
    "frpo.objectives.gspo": ("GSPO",),
    "frpo.objectives.kl_control": ("KLControl",),
    "frpo.objectives.preference": ("BradleyTerry", "Cost"),
    "frpo.objectives.reinforce": ("Reinforce",),
    "frpo.objectives.scalarise": ("GDPO", "RVPO"),
    "frpo.objectives.supervised": ("KLSFT", "SFT"),
}
_NAMES = {name.removesuffix("Section"): (module, name) for module, names in _PLACES.items() for name in names}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _NAMES[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return __all__
