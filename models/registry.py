"""What a layer can be made of: one line for each family of mixers and each kind of feed-forward layer.

The name is what a layer plan and a config say; its type is the options' class, which builds the layer. A family named
`linear_attention` here may be written `linear-attention` in a plan.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from .experts import ExpertsOptions
from .mixers.attention import AttentionOptions
from .mixers.hyena import HyenaOptions
from .mixers.mamba import MambaOptions
from .mlp import MLPOptions


class MixerGroups(BaseModel):
    """Options of every family of mixers."""

    attention: AttentionOptions = Field(default_factory=AttentionOptions)
    hyena: HyenaOptions = Field(default_factory=HyenaOptions)
    mamba: MambaOptions = Field(default_factory=MambaOptions)


class FeedForwardGroups(BaseModel):
    """Options of every kind of feed-forward layer."""

    mlp: MLPOptions = Field(default_factory=MLPOptions)
    moe: ExpertsOptions = Field(default_factory=ExpertsOptions)


MIXERS: tuple[str, ...] = tuple(MixerGroups.model_fields)
FEED_FORWARDS: tuple[str, ...] = tuple(FeedForwardGroups.model_fields)
