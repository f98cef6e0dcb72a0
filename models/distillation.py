"""Implicit Hyena layers as recurrences: each filter becomes a sum of a few modes (Massaroli et al., arXiv 2310.18780).

    h_t = Re sum_n R_n p_n^t, nearly, for t < max_length

A Hyena layer of order 2 with such a filter is a `modal_hyena` layer: its state is N complex numbers a channel, however
long the text, where the implicit one keeps every token. Training stays with the implicit form.

The authors fit modes by gradient descent. Here they are read off the filter's Hankel matrix H_ij = h_{i+j}, whose rank
is the number of modes: the dominant left singular vectors (by a randomised range finder, as H times anything is a
convolution) span sums of the p_n^i, and what moves their rows up by one has the p_n as eigenvalues (ESPRIT: Roy and
Kailath, 1989). The residues are a least-squares fit.

Shapes: D channels, L lags, M rows and C columns of the Hankel matrix, Q directions, N modes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .config import ConfigError, ModelConfig
from .language_model import LanguageModel
from .mixers.hyena import Hyena
from .mixers.modal_hyena import ModalHyena
from .plan import LayerPlan, write_layers

SPARE_DIRECTIONS = 10
"""Of the range finder, beyond those that are wanted (Halko, Martinsson and Tropp, arXiv 0909.4061)."""
SMALLEST_SINGULAR_VALUE = 1e-8
"""Of the modes' matrix, relative: smaller ones would be met with residues that cancel, which float32 cannot."""
SAME_PARAMETERS = ("in_proj.weight", "in_proj.bias", "conv_weight", "conv_bias", "out_proj.weight", "out_proj.bias")


class Distilled(NamedTuple):
    """A model without implicit filters.

    Attributes:
        model: all else is as it was, the sum of modes included in its own dtype.
        errors: of each distilled layer by index, the filters' error |h' - h| / |h| over all channels and lags.
    """

    model: LanguageModel
    errors: dict[int, float]


@torch.no_grad()
def distil(model: LanguageModel, modes: int) -> Distilled:
    """The model with each Hyena layer's filters replaced by `modes` modes a channel.

    The new layers have no longest sequence; beyond the old one's `max_length` they go on as their modes do.

    Raises:
        ConfigError: no Hyena layer, or one of another order than 2, whose convolutions follow each other.
    """
    config = distilled_config(model.config, modes)
    with torch.device("meta"):
        made = LanguageModel(config).to(model.embedding.weight.dtype)
    made.to_empty(device=model.embedding.weight.device)
    theirs, errors = dict(model.state_dict()), dict[int, float]()
    for index, (block, old) in enumerate(zip(made.blocks, model.blocks, strict=True)):
        if isinstance(old.mixer, Hyena):
            assert isinstance(block.mixer, ModalHyena)
            errors[index] = fill(block.mixer, old.mixer)
            theirs |= {f"blocks.{index}.mixer.{name}": tensor for name, tensor in block.mixer.state_dict().items()}
    made.load_state_dict({name: theirs[name] for name in made.state_dict()})
    return Distilled(made.train(model.training), errors)


def distilled_config(config: ModelConfig, modes: int) -> ModelConfig:
    """The description of what `distil` makes; errors as there."""
    layers = []
    for index, layer in enumerate(config.plan):
        if layer.mixer != "hyena":
            layers.append(layer)
            continue
        options = config.mixer_options(layer).model_dump()
        if options["order"] != 2:
            raise ConfigError(f"layer {index} is hyena of order {options['order']}; only order 2 can be distilled")
        changes = {"modes": modes, "conv": options["conv"], "heads": 1}
        layers.append(LayerPlan("modal_hyena", layer.feed_forward, changes, layer.feed_forward_options))
    if not any(layer.mixer == "hyena" for layer in config.plan):
        raise ConfigError("the model has no hyena layer to distil")
    return ModelConfig.parse({**config.model_dump(), "layers": write_layers(layers)})


def fill(ours: ModalHyena, theirs: Hyena) -> float:
    """Give the new layer the old one's parameters, its filter's modes and the direct term; the filters' error."""
    state = theirs.state_dict()
    lags_L = torch.arange(theirs.filter.options.max_length, device=theirs.skip.device)
    filter_DL = theirs.filter(lags_L, slice(0, theirs.width), 0).double().cpu()
    poles_DN, residues_DN = fit_modes(filter_DL, ours.poles.shape[1])
    made = {"poles": torch.view_as_real(poles_DN), "residues": torch.view_as_real(residues_DN), "D": theirs.skip[0]}
    ours.load_state_dict({name: state[name] for name in SAME_PARAMETERS} | made)
    log_poles_DN, residues_DN, _ = ours.modes()
    missing, size = 0.0, 0.0
    for log_poles_N, residues_N, filter_L in zip(log_poles_DN, residues_DN, filter_DL, strict=True):
        powers_LN = torch.exp(lags_L.unsqueeze(1) * log_poles_N)
        missing += float(((powers_LN @ residues_N).real.cpu() - filter_L).square().sum())
        size += float(filter_L.square().sum())
    return (missing / size) ** 0.5


def fit_modes(filter_DL: Tensor, modes: int) -> tuple[Tensor, Tensor]:
    """Poles inside the unit circle and residues (D, N), complex128, of real filters in float64."""
    poles_DN = torch.full((len(filter_DL), modes), 0.5, dtype=torch.complex128)  # where fewer do: with residue 0
    residues_DN = torch.zeros_like(poles_DN)
    for channel, filter_L in enumerate(filter_DL):
        poles_N = find_poles(filter_L, modes)
        powers_LN = torch.exp(torch.arange(len(filter_L)).unsqueeze(1) * poles_N.log())
        basis_L2N = torch.cat([powers_LN.real, -powers_LN.imag], dim=1)
        solution = torch.linalg.lstsq(
            basis_L2N, filter_L.unsqueeze(1), rcond=SMALLEST_SINGULAR_VALUE, driver="gelsd"
        ).solution
        poles_DN[channel, : len(poles_N)] = poles_N
        residues_DN[channel, : len(poles_N)] = torch.complex(*solution[:, 0].chunk(2))
    return poles_DN, residues_DN


def find_poles(filter_L: Tensor, modes: int) -> Tensor:
    """At most `modes` poles, one of each conjugate pair; rounded to what complex64 holds, as they will be."""
    length = len(filter_L)
    rows, columns = length // 2, length - length // 2 + 1
    directions = min(2 * modes + SPARE_DIRECTIONS, rows - 1, columns)
    spectrum = torch.fft.rfft(filter_L, n=2 * length)

    def hankel(x: Tensor, out: int) -> Tensor:
        """H x, or H' x, for the rows of x, cut to `out` numbers: both have h_{i+j}."""
        return torch.fft.irfft(spectrum * torch.fft.rfft(x, n=2 * length).conj())[:, :out]

    def basis(x: Tensor) -> Tensor:
        """Orthonormal rows."""
        return torch.linalg.qr(x.mT).Q.mT

    random_QC = torch.randn(directions, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    range_QM = basis(hankel(random_QC, rows))
    range_QM = basis(hankel(basis(hankel(range_QM, columns)), rows))
    vectors_QM = torch.linalg.svd(hankel(range_QM, columns), full_matrices=False).U.mT @ range_QM
    moved_QQ, last_Q = vectors_QM[:, :-1] @ vectors_QM[:, 1:].mT, vectors_QM[:, -1]
    poles = torch.zeros(0, dtype=torch.complex128)
    for order in range(min(2 * modes, directions), 0, -1):
        moved, last = moved_QQ[:order, :order], last_Q[:order]
        # least squares; the columns are orthonormal but for their last row
        poles = torch.linalg.eigvals(moved + torch.outer(last, last @ moved) / (1 - last.square().sum()))
        poles = poles[poles.imag >= 0]  # a real one counts once, and so does a pair
        if len(poles) <= modes:
            break
    return (poles / poles.abs().clamp(min=1)).to(torch.complex64).to(torch.complex128)
