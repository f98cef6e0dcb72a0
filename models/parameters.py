"""Parameters that know how they begin, and the few layers that every model is made of.

A module declares a parameter (or a buffer) with its shape and an initialiser; nothing is filled in at construction.
`initialise` then gives every parameter a value that depends on the seed, the parameter's full name and its full shape
alone: not on the dtype, the device, the order of construction or how the parameter is sharded. So one seed means one
model, whatever the degrees of parallelism.

Shapes: B batch, T tokens, D features in, F features out, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..kernels import rms_norm

Initialiser = Callable[[Sequence[int], torch.Generator], Tensor]
"""(full shape, generator) -> float32 values on the CPU."""


class Initialisers(dict[str, Initialiser]):
    """Those of a module's parameters, by name. They are functions, which pickle cannot write: a module that it reads
    has its values, but cannot begin anew."""

    def __reduce__(self) -> tuple[type[Initialisers], tuple[()]]:
        return Initialisers, ()

    def __deepcopy__(self, memo: dict[int, object]) -> Initialisers:
        return Initialisers(self)


class ParameterModule(nn.Module):
    """A module whose parameters are declared with their initialisers."""

    def __init__(self) -> None:
        super().__init__()
        self.initialisers = Initialisers()
        self.undecayed: set[str] = set()
        self.halved: set[str] = set()
        self.rate_multiples: dict[str, float] = {}

    def parameter(
        self,
        name: str,
        shape: Sequence[int],
        init: Initialiser,
        *,
        decay: bool | None = None,
        half: bool = False,
        rate: float = 1.0,
    ) -> nn.Parameter:
        """Register and return an uninitialised parameter.

        Args:
            shape: the full shape.
            init: called by `initialise` with the full shape and a generator of this parameter's own.
            decay: whether weight decay applies; by default to matrices and not to vectors.
            half: in mixed precision it computes in the half type of the activations that it multiplies. By default it
                stays in float32: what makes decays, step sizes, poles, filters, norms and routers must.
            rate: its learning rate as a multiple of the run's.
        """
        parameter = nn.Parameter(torch.empty(*shape))
        self.register_parameter(name, parameter)
        self.initialisers[name] = init
        if not (len(shape) >= 2 if decay is None else decay):
            self.undecayed.add(name)
        if half:
            self.halved.add(name)
        if rate != 1:
            self.rate_multiples[name] = rate
        return parameter

    def buffer(self, name: str, shape: Sequence[int], init: Initialiser) -> Tensor:
        """Register and return an uninitialised buffer: saved with the model, the same on all processes, not trained."""
        self.register_buffer(name, torch.empty(*shape))
        self.initialisers[name] = init
        self.undecayed.add(name)
        return self.get_buffer(name)


def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter and buffer of `model` its initial value, in place; sharded ones receive their part.

    Raises:
        TypeError: a parameter that no `ParameterModule` declared.
    """
    with torch.no_grad():
        for name, parameter, init in _declared(model):
            generator = torch.Generator().manual_seed(_seed_for(seed, name))
            full = init(tuple(parameter.shape), generator)
            if isinstance(parameter, DTensor):
                full = full.to(device=parameter.device, dtype=parameter.dtype)
                part = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())
            else:
                parameter.copy_(full)


def weight_decayed(model: nn.Module) -> set[str]:
    """Full names of the parameters to which weight decay applies."""
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, ParameterModule):
            own = module.named_parameters(recurse=False)
            names |= {_join(prefix, name) for name, _ in own if name not in module.undecayed}
    return names


def learning_rates(model: nn.Module) -> dict[str, float]:
    """Full names of the parameters whose learning rate is a multiple of the run's, and the multiple."""
    return {
        _join(prefix, name): rate
        for prefix, module in model.named_modules()
        if isinstance(module, ParameterModule)
        for name, rate in module.rate_multiples.items()
    }


def kept_in_float32(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that mixed precision leaves in float32; see `ParameterModule.parameter`."""
    kept = set()
    for module in model.modules():
        if isinstance(module, ParameterModule):
            own = module.named_parameters(recurse=False)
            kept |= {parameter for name, parameter in own if name not in module.halved}
    return kept


def _declared(model: nn.Module) -> Iterator[tuple[str, Tensor, Initialiser]]:
    for prefix, module in model.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, parameter in tensors:
            if not isinstance(module, ParameterModule) or name not in module.initialisers:
                raise TypeError(f"parameter {_join(prefix, name)} was not declared through ParameterModule.parameter")
            yield _join(prefix, name), parameter, module.initialisers[name]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _seed_for(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def constant(value: float) -> Initialiser:
    return lambda shape, generator: torch.full(tuple(shape), value)


def normal(std: float) -> Initialiser:
    return lambda shape, generator: torch.randn(tuple(shape), generator=generator) * std


def uniform(bound: float) -> Initialiser:
    """Uniform in (-bound, bound)."""
    return lambda shape, generator: (torch.rand(tuple(shape), generator=generator) * 2 - 1) * bound


def log_uniform(smallest: float, largest: float) -> Initialiser:
    """Logarithms of step sizes, uniform between those of `smallest` and `largest`."""
    if smallest > largest:
        raise ValueError(
            f"dt_min {smallest:g} exceeds dt_max {largest:g}; give step sizes from the smaller to the larger"
        )
    low, high = math.log(smallest), math.log(largest)
    return lambda shape, generator: torch.rand(tuple(shape), generator=generator) * (high - low) + low


def orthogonal(gain: float = 1.0) -> Initialiser:
    """Orthogonal rows or columns, whichever are fewer, times `gain` and sqrt(F / D) where F > D (RWKV's matrices)."""

    def init(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        rows, columns = shape
        scale = gain * math.sqrt(max(1.0, rows / columns))
        return nn.init.orthogonal_(torch.empty(rows, columns), scale, generator=generator)

    return init


def fan_in_uniform(scale: float = 1.0) -> Initialiser:
    """torch.nn.Linear's default, U(-1/sqrt(D), 1/sqrt(D)) with D the last dimension, times `scale`."""
    return lambda shape, generator: uniform(scale / math.sqrt(shape[-1]))(shape, generator)


def at_least_float32(x: Tensor) -> Tensor:
    """Half types become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Linear(ParameterModule):
    """y = x W' + b. `weight`: (F, D); `bias`: (F,), absent unless asked for, and zero at first unless said.

    In the dtype of the weight: with `half` that of the activations, without it float32 even in mixed precision.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        init: Initialiser,
        *,
        bias: bool = False,
        bias_init: Initialiser | None = None,
        half: bool = True,
    ) -> None:
        super().__init__()
        self.weight = self.parameter("weight", (out_dim, in_dim), init, half=half)
        self.bias = self.parameter("bias", (out_dim,), bias_init or constant(0.0), half=half) if bias else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.linear(x_BTD.to(self.weight.dtype), self.weight, self.bias)


class Embedding(ParameterModule):
    """Rows of `weight` (V, D) by token id, N(0, std) at first."""

    def __init__(self, vocab_size: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = self.parameter("weight", (vocab_size, width), normal(std), half=True)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


class RMSNorm(ParameterModule):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = self.parameter("weight", (width,), constant(1.0))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        return rms_norm(x_BTD, self.weight, self.eps)


class OuterRMSNorm(RMSNorm):
    """x / (sqrt(mean(x^2)) + eps) * weight, Evo 2's: small inputs come out larger than of `RMSNorm`."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = at_least_float32(x_BTD)
        size_BT1 = torch.linalg.vector_norm(wide_BTD, dim=-1, keepdim=True) / math.sqrt(x_BTD.shape[-1])
        return (wide_BTD / (size_BT1 + self.eps) * self.weight).to(x_BTD.dtype)


class LayerNorm(ParameterModule):
    """Zero mean, unit variance over the last dimension, then weight and bias (Ba et al., arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = self.parameter("weight", (width,), constant(1.0))
        self.bias = self.parameter("bias", (width,), constant(0.0))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.to(self.weight.dtype)
        return F.layer_norm(wide_BTD, self.weight.shape, self.weight, self.bias, self.eps).to(x_BTD.dtype)


def make_norm(kind: str, width: int, eps: float) -> RMSNorm | LayerNorm:
    """`kind`: "rms", "rms_outer" or "layer"."""
    return {"rms": RMSNorm, "rms_outer": OuterRMSNorm, "layer": LayerNorm}[kind](width, eps)
