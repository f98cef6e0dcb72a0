"""Mixers: one family a file, each the paper's equations over a sequence shard; `models.registry` names them."""

from .base import LayerPlace, Mixer, MixerOptions, Shared, State

__all__ = ["LayerPlace", "Mixer", "MixerOptions", "Shared", "State"]
