"""Checkpoints of other software, in and out, as safetensors; tensor by tensor, also for sharded models."""

from .files import InterchangeError
from .layouts import LAYOUTS, load_config
from .loading import load_into, load_pretrained
from .saving import save_pretrained

__all__ = ["LAYOUTS", "InterchangeError", "load_config", "load_into", "load_pretrained", "save_pretrained"]
