"""Arithmetic on one device. Each operation has a readable reference, portable code, and one public door."""

from .attention import attention
from .experts import RowMap, gather_rows, grouped_matmul, permute, sum_rows
from .gated_linear_attention import gated_linear_attention, gated_linear_attention_readout
from .linear_cross_entropy import linear_cross_entropy
from .long_convolution import long_convolution
from .modal_convolution import begin_modal_convolution, modal_convolution
from .norms import rms_norm
from .rotary import rotary
from .selective_scan import ScanStages, begin_selective_scan, selective_scan
from .short_convolution import short_convolution
from .stages import Stages
from .state_space_dual import begin_state_space_dual, state_space_dual
from .swiglu import swiglu
from .wkv4 import wkv4, wkv4_state
from .wkv7 import Wkv7Stages, begin_wkv7, wkv7

__all__ = [
    "RowMap",
    "ScanStages",
    "Stages",
    "Wkv7Stages",
    "attention",
    "begin_modal_convolution",
    "begin_selective_scan",
    "begin_state_space_dual",
    "begin_wkv7",
    "gated_linear_attention",
    "gated_linear_attention_readout",
    "gather_rows",
    "grouped_matmul",
    "linear_cross_entropy",
    "long_convolution",
    "modal_convolution",
    "permute",
    "rms_norm",
    "rotary",
    "selective_scan",
    "short_convolution",
    "state_space_dual",
    "sum_rows",
    "swiglu",
    "wkv4",
    "wkv4_state",
    "wkv7",
]
