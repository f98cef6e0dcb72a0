"""bfloat16 training: matrices compute in bfloat16; decays, step sizes, poles, filters, norms, routers in float32."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longstride import kernels
from longstride.models import LanguageModel, ModelConfig, build_model, initialise, kept_in_float32, list_presets
from longstride.parallel import Mesh, SequenceShard, shard_model
from tests.distributed import run_ranks

from .cases import MIXER_CASES, MODEL_CASES, SMALL

LENGTH = 24
Seen = dict[str, set[torch.dtype]]

# arguments of kernels that say how fast something is forgotten, or that are sums over the sequence
WIDE = {
    "A_DN",
    "D",
    "delta_BTD",
    "delta_bias",
    "log_decay_BTH",
    "log_decay_BTHK",
    "log_decay_D",
    "log_poles_DN",
    "log_w_BTHN",
    "residues_DN",
    "bonus_D",
    "filter_DL",
    "skip",
    "initial_state",
    "state_BDN",
    "state_BHPN",
    "weight",
    "weight_DW",
}
# what the other arguments are even in mixed precision, because a mixer computes them in float32 on purpose
WIDE_FAMILIES = {"linear_attention", "lstm", "conba, exact"}


def sharded(case: dict[str, Any], float32: bool = True) -> tuple[LanguageModel, SequenceShard]:
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse({**SMALL, "feed_forward": "mlp", **case}))
    mesh = Mesh(sequence=2)
    kept = kept_in_float32(model) if float32 else frozenset[torch.nn.Parameter]()
    blocks = list(model.blocks)
    shard_model(model, mesh, blocks=blocks, experts=model.expert_modules(), param_dtype=torch.bfloat16, float32=kept)
    model.to_empty(device="cpu")
    initialise(model, seed=3)
    return model, mesh.shard(LENGTH, [10])


def tokens() -> Tensor:
    return torch.randint(SMALL["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))


def watch_kernels(replace: Callable[[Any, str, Any], None] = setattr) -> Seen:
    """From here on, the dtypes of every tensor that a kernel is called with, by kernel and argument."""
    seen: Seen = defaultdict(set)
    doors = {name: getattr(kernels, name) for name in kernels.__all__}

    def watched(name: str, door: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(door)

        def call(*args: Any, **kwargs: Any) -> Any:
            for argument, value in signature.bind(*args, **kwargs).arguments.items():
                if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                    seen[f"{name}.{argument}"].add(value.dtype)
            return door(*args, **kwargs)

        return call

    replaced = {name: watched(name, door) for name, door in doors.items() if inspect.isfunction(door)}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(("longstride.models", "longstride.parallel")):
            for name, door in doors.items():
                if name in replaced and module.__dict__.get(name) is door:
                    replace(module, name, replaced[name])
    return seen


def dtypes(
    rank: int, world: int, names: list[str], float32: bool
) -> dict[str, tuple[Seen, dict[str, torch.dtype], set[torch.dtype]]]:
    """Of each case: dtypes at the kernels, of the parameters while they compute, of sharded ones and gradients."""
    seen, found = watch_kernels(), {}
    for name in names:
        seen.clear()
        model, shard = sharded(MIXER_CASES[name], float32)
        computing: dict[str, torch.dtype] = {}

        def look(block: torch.nn.Module, _: object, computing: dict[str, torch.dtype] = computing) -> None:
            parameters = block.get_submodule("mixer").named_parameters()
            computing.update({parameter: value.dtype for parameter, value in parameters})

        model.blocks[0].register_forward_pre_hook(look)
        here = tokens()[:, shard.start : shard.stop]
        model.loss(here, here, shard).backward()
        kept = {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters() if p.grad is not None}
        found[name] = (dict(seen), computing, kept)
    return found


def test_which_dtypes_arrive_in_the_kernels_for_every_mixer() -> None:
    names = list(MIXER_CASES)
    for found in run_ranks(dtypes, 2, names, True, timeout=280):
        for name, (seen, computing, kept) in found.items():
            assert kept == {torch.float32}, f"{name}: master weights and gradients"
            narrow = {torch.bfloat16}
            for argument, arrived in seen.items():
                if argument.split(".")[1] in WIDE:
                    assert not arrived & {torch.bfloat16, torch.float16}, f"{name}: {argument} arrives in {arrived}"
            model = build_model(ModelConfig.parse({**SMALL, **MIXER_CASES[name]}))
            expected = kept_in_float32(model)
            for parameter, value in model.blocks[0].mixer.named_parameters():  # type: ignore[union-attr]
                dtype = torch.float32 if value in expected else torch.bfloat16
                assert computing[parameter] == dtype, f"{name}: {parameter} computes in {computing[parameter]}"
            family = MIXER_CASES[name]["layers"]
            if not any(wide in name for wide in WIDE_FAMILIES):
                assert any(arrived == narrow for arrived in seen.values()), f"{name} ({family}): {seen}"


MATRICES = {"in_proj.weight", "x_proj.weight", "out_proj.weight"}


def test_negative_control_one_precision_for_all_rounds_the_decays() -> None:
    _, computing, _ = run_ranks(dtypes, 2, ["mamba"], False)[0]["mamba"]
    assert computing["A_log"] == torch.bfloat16 and computing["dt_proj.bias"] == torch.bfloat16
    _, computing, _ = run_ranks(dtypes, 2, ["mamba"], True)[0]["mamba"]
    assert {name for name, dtype in computing.items() if dtype == torch.bfloat16} == MATRICES


HYBRID: dict[str, Any] = {
    "width": 32,
    "layers": "[mamba, hyena(max_length=64)+moe, mamba2(head_dim=16, state=8), modal_hyena+moe, attention(heads=4)]",
    "moe": {"experts": 4, "hidden": 24, "balance": "bias", "shared": 1},
    "init_std": 0.02,
}


def hybrid_losses(rank: int, world: int) -> tuple[float, dict[str, Tensor]]:
    model, shard = sharded(HYBRID)
    here = tokens()[:, shard.start : shard.stop]
    losses = model(here, here, shard)
    losses.total.backward()
    model.end_step()
    assert losses.cross_entropy.dtype == torch.float32
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters() if isinstance(p.grad, DTensor)}
    return float(losses.cross_entropy.detach()), grads


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


def test_loss_and_gradients_are_those_of_float32_within_bfloat16() -> None:
    model = build_model(ModelConfig.parse({**SMALL, "feed_forward": "mlp", **HYBRID}), seed=3)
    losses = model(tokens(), tokens(), SequenceShard.whole(LENGTH, [10]))
    losses.total.backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()}
    loss, grads = run_ranks(hybrid_losses, 2)[0]
    assert loss == pytest.approx(float(losses.cross_entropy.detach()), rel=2e-3)
    for name, grad in exact.items():
        assert grad is not None and grad.dtype == torch.float32
        assert relative(grads[name], grad) < 0.2, name


SLOW = "[mamba2(state=8, head_dim=16, dt_min=0.01, dt_max=0.2)] x 2"
"""Sums of log decays reach hundreds within a chunk and matter far below one."""


def mamba2_gradients(dtype: torch.dtype) -> dict[str, Tensor]:
    """Of the decays' parameters, over chunks of many tokens; in float64, of the numbers that bfloat16 computes with."""
    case = {**SMALL, "width": 32, "layers": SLOW, "tie_embeddings": False}
    model = build_model(ModelConfig.parse(case))
    kept = kept_in_float32(model)
    for parameter in model.parameters():
        parameter.data = parameter.data if parameter in kept else parameter.data.bfloat16()
        parameter.data = parameter.data.double() if dtype == torch.float64 else parameter.data
    long = torch.randint(SMALL["vocab_size"], (2, 600), generator=torch.Generator().manual_seed(0))
    model.loss(long, long.roll(-1, 1)).backward()
    named = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.double() for name, grad in named.items() if name.endswith(("A_log", "dt_bias"))}


def test_mamba2_sums_its_log_decays_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    exact, found = mamba2_gradients(torch.float64), mamba2_gradients(torch.bfloat16)
    assert len(exact) == 4 and all(relative(found[name], exact[name]) < 0.025 for name in exact)
    cumsum = Tensor.cumsum

    def rounded(x: Tensor, *args: Any) -> Tensor:
        sums = cumsum(x, *args)
        return sums.bfloat16().to(sums.dtype) if sums.is_floating_point() else sums

    monkeypatch.setattr(Tensor, "cumsum", rounded)
    bent = mamba2_gradients(torch.bfloat16)  # negative control
    assert all(relative(bent[name], exact[name]) > 0.03 for name in exact)


WHOLE = {name: {**SMALL, **case} for name, case in MODEL_CASES.items()}
WHOLE |= {name: name for name in list_presets() if name.endswith("-small")}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_layers_of_every_model_meet_in_bfloat16(name: str, autocast: bool) -> None:
    """With what stays in float32 there, as FSDP has it, or under PyTorch's autocast."""
    case = WHOLE[name]
    model = build_model(case if isinstance(case, str) else ModelConfig.parse(case))
    here = torch.randint(model.config.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.loss(here, here)
    if not autocast:
        kept = kept_in_float32(model)
        for parameter in model.parameters():
            if parameter not in kept:
                parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model.loss(here, here)
    loss.backward()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact), rel=1e-2)
