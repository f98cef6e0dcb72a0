"""Arithmetic on one device. Each operation has a readable reference, portable code, and one public door."""

from .attention import attention
from .experts import grouped_matmul, permute
from .linear_cross_entropy import linear_cross_entropy
from .long_convolution import long_convolution
from .norms import rms_norm
from .rotary import rotary
from .selective_scan import selective_scan, selective_scan_readout
from .short_convolution import short_convolution
from .swiglu import swiglu

__all__ = [
    "attention",
    "grouped_matmul",
    "linear_cross_entropy",
    "long_convolution",
    "permute",
    "rms_norm",
    "rotary",
    "selective_scan",
    "selective_scan_readout",
    "short_convolution",
    "swiglu",
]
