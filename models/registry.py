"""What a layer can be made of: one line for each family of mixers and each kind of feed-forward layer.

The name is what a layer plan and a config say; its type is the options' class, which builds the layer. A family named
`linear_attention` here may be written `linear-attention` in a plan.
"""

from __future__ import annotations

from pydantic import BaseModel, Field

from .channel_mix import ChannelMixOptions
from .experts import ExpertsOptions
from .mixers.attention import AttentionOptions
from .mixers.conba import ConbaOptions
from .mixers.flash import FlashOptions
from .mixers.gau import GAUOptions
from .mixers.h3 import H3Options
from .mixers.hyena import HyenaOptions
from .mixers.linear_attention import LinearAttentionOptions
from .mixers.lstm import LSTMOptions
from .mixers.mamba import MambaOptions
from .mixers.mamba2 import Mamba2Options
from .mixers.modal_hyena import ModalHyenaOptions
from .mixers.retnet import RetNetOptions
from .mixers.rwkv4 import RWKV4Options
from .mixers.rwkv7 import RWKV7Options
from .mixers.s4 import S4Options
from .mixers.s4d import S4DOptions
from .mixers.striped_hyena_2 import HyenaLIOptions, HyenaMROptions, HyenaSEOptions
from .mlp import MLPOptions


class MixerGroups(BaseModel):
    """Options of every family of mixers."""

    attention: AttentionOptions = Field(default_factory=AttentionOptions)
    conba: ConbaOptions = Field(default_factory=ConbaOptions)
    flash: FlashOptions = Field(default_factory=FlashOptions)
    gau: GAUOptions = Field(default_factory=GAUOptions)
    h3: H3Options = Field(default_factory=H3Options)
    hyena: HyenaOptions = Field(default_factory=HyenaOptions)
    hyena_li: HyenaLIOptions = Field(default_factory=HyenaLIOptions)
    hyena_mr: HyenaMROptions = Field(default_factory=HyenaMROptions)
    hyena_se: HyenaSEOptions = Field(default_factory=HyenaSEOptions)
    linear_attention: LinearAttentionOptions = Field(default_factory=LinearAttentionOptions)
    lstm: LSTMOptions = Field(default_factory=LSTMOptions)
    mamba: MambaOptions = Field(default_factory=MambaOptions)
    mamba2: Mamba2Options = Field(default_factory=Mamba2Options)
    modal_hyena: ModalHyenaOptions = Field(default_factory=ModalHyenaOptions)
    retnet: RetNetOptions = Field(default_factory=RetNetOptions)
    rwkv4: RWKV4Options = Field(default_factory=RWKV4Options)
    rwkv7: RWKV7Options = Field(default_factory=RWKV7Options)
    s4: S4Options = Field(default_factory=S4Options)
    s4d: S4DOptions = Field(default_factory=S4DOptions)


class FeedForwardGroups(BaseModel):
    """Options of every kind of feed-forward layer."""

    mlp: MLPOptions = Field(default_factory=MLPOptions)
    moe: ExpertsOptions = Field(default_factory=ExpertsOptions)
    channel_mix: ChannelMixOptions = Field(default_factory=ChannelMixOptions)


MIXERS: tuple[str, ...] = tuple(MixerGroups.model_fields)
FEED_FORWARDS: tuple[str, ...] = tuple(FeedForwardGroups.model_fields)
