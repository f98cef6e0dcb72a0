"""What is computed: mixers, blocks, experts, language models, presets."""

from .build import build_model
from .config import ConfigError, ModelConfig, one_line
from .distillation import Distilled, distil
from .dropout import DropoutKey
from .language_model import LanguageModel, Losses, Part
from .parameters import initialise, kept_in_float32, weight_decayed
from .plan import PlanError
from .presets import list_presets, load_preset, preset_text

__all__ = [
    "ConfigError",
    "Distilled",
    "DropoutKey",
    "LanguageModel",
    "Losses",
    "ModelConfig",
    "Part",
    "PlanError",
    "build_model",
    "distil",
    "initialise",
    "kept_in_float32",
    "list_presets",
    "load_preset",
    "one_line",
    "preset_text",
    "weight_decayed",
]
