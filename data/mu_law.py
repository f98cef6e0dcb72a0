"""Sound in 256 levels a sample, as WaveNet (arXiv 1609.03499, section 2.2) and SaShiMi (arXiv 2202.09729) have it.

Samples in [-1, 1] are companded, f(x) = sign(x) ln(1 + 255 |x|) / ln 256, and rounded to the nearest of 256 levels that
are evenly apart in f. Loudness stays what it is; SaShiMi's code scales every clip to its own extremes, which are not
known before its end.
"""

import numpy as np

LEVELS = 256
SILENCE = 128  # the level of 0
_MU = LEVELS - 1


def encode(samples: np.ndarray) -> np.ndarray:
    """Levels, uint8, of samples of any float type; those beyond -1 and 1 are clipped."""
    clipped = samples.astype(np.float64).clip(-1, 1)
    companded = np.sign(clipped) * np.log1p(_MU * np.abs(clipped)) / np.log1p(_MU)
    return ((companded + 1) / 2 * _MU + 0.5).astype(np.uint8)


def decode(levels: np.ndarray) -> np.ndarray:
    """The samples, float64 in [-1, 1], that levels stand for."""
    companded = 2 * levels.astype(np.float64) / _MU - 1
    return np.sign(companded) * (LEVELS ** np.abs(companded) - 1) / _MU
