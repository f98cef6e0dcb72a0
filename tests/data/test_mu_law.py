"""Levels of mu-law against the formula, written out a sample at a time."""

import math

import numpy as np

from longstride.data.mu_law import LEVELS, SILENCE, decode, encode


def slowly(sample, mu=255):
    """The formula of WaveNet's section 2.2, a sample at a time."""
    companded = math.copysign(math.log(1 + mu * abs(sample)) / math.log(1 + mu), sample)
    return min(range(mu + 1), key=lambda level: (abs(companded - (2 * level / mu - 1)), -level))


def test_levels_are_those_of_the_formula():
    samples = np.concatenate([np.linspace(-1, 1, 501), np.geomspace(1e-7, 1, 99), [0.0]])
    levels = encode(samples)
    assert levels.dtype == np.uint8 and levels.tolist() == [slowly(sample) for sample in samples]
    assert levels.tolist() != [slowly(sample, mu=254) for sample in samples], "negative control: the steps matter"
    assert (encode(np.array([0.0, -3.0, 3.0])) == [SILENCE, 0, LEVELS - 1]).all(), "clipped"


def test_the_way_back_is_as_near_as_half_a_level():
    every = np.arange(LEVELS, dtype=np.uint8)
    assert np.array_equal(encode(decode(every)), every)
    assert decode(every)[0] == -1 and decode(every)[-1] == 1 and (np.diff(decode(every)) > 0).all()
    samples = np.linspace(-1, 1, 100_001)
    # f moves by half of 2/255 at most, and 1/f' = ln(256) (|x| + 1/255), which grows by exp(ln(256)/255) meanwhile.
    bound = math.log(256) / 255 * (np.abs(samples) + 1 / 255) * 256 ** (1 / 255)
    error = np.abs(decode(encode(samples)) - samples)
    assert (error <= bound).all()
    linear = np.abs(np.round((samples + 1) / 2 * 255) / 255 * 2 - 1 - samples)
    assert not (linear <= bound).all(), "negative control: levels apart evenly are worse where it is quiet"
