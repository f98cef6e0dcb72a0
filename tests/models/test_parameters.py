"""Initial values: they depend on the seed and the parameter's name, and on nothing else."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from longstride.models import LanguageModel, ModelConfig, build_model, initialise, weight_decayed
from longstride.models.mixers.hyena import ImplicitFilter
from longstride.models.mixers.mamba import log_uniform_step_sizes
from longstride.models.parameters import LayerNorm
from longstride.parallel import Mesh, shard_model
from tests.distributed import run_ranks

from .cases import MIXER_CASES, make_model

CONFIG = {
    "vocab_size": 48,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64)+moe, attention(heads=4), mamba+moe]",
    "moe": {"experts": 4, "hidden": 24},
}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_the_seed_decides() -> None:
    first, again, other = (values(build_model(CONFIG, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    random = [name for name in first if first[name].std() > 0 and "A_log" not in name]
    assert random and all(not torch.equal(first[name], other[name]) for name in random)


def test_the_dtype_only_rounds() -> None:
    single = values(build_model(CONFIG))
    for dtype in (torch.float64, torch.bfloat16):
        for name, value in values(build_model(CONFIG, dtype=dtype)).items():
            assert value.dtype == dtype
            assert torch.equal(value, single[name].to(dtype)), name


def test_other_layers_do_not_move_a_parameter() -> None:
    longer = build_model({**CONFIG, "layers": "[mamba, attention(heads=4)]"})
    shorter = build_model({**CONFIG, "layers": "[mamba]"})
    for name in ("blocks.0.mixer.in_proj.weight", "embedding.weight"):
        assert torch.equal(values(longer)[name], values(shorter)[name])


def sharded_values(rank: int, world_size: int, degrees: dict[str, int]) -> dict[str, Tensor]:
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = LanguageModel(ModelConfig.parse(CONFIG))
    shard_model(model, mesh, blocks=list(model.blocks), experts=model.expert_modules())
    model.to_empty(device="cpu")
    initialise(model, seed=5)
    return {name: parameter.full_tensor() for name, parameter in values(model).items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "degrees",
    [{"sequence": 2}, {"data": 2, "expert": 2}, {"data": 2, "sequence": 2, "expert": 2}, {"sequence": 4, "expert": 4}],
)
def test_the_mesh_does_not_matter(degrees: dict[str, int]) -> None:
    expected = values(build_model(CONFIG, seed=5))
    world_size = degrees.get("data", 1) * degrees.get("sequence", 1)
    for sharded in run_ranks(sharded_values, world_size, degrees):
        assert sharded.keys() == expected.keys()
        for name, value in sharded.items():
            assert torch.equal(value, expected[name]), name


def test_mamba_begins_as_its_authors_code_does() -> None:
    model = build_model({"vocab_size": 64, "width": 64, "layers": "[mamba] x 4", "feed_forward": "none"})
    mixer = values(model.blocks[0].mixer)
    assert torch.equal(mixer["A_log"], torch.arange(1.0, 17.0).log().expand(128, 16))
    assert torch.equal(mixer["D"], torch.ones(128))
    assert mixer["dt_proj.weight"].abs().max() <= 4**-0.5
    steps = torch.nn.functional.softplus(mixer["dt_proj.bias"])
    assert steps.min() >= 0.99e-3 and steps.max() <= 1.01e-1
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.5
    bound = 1 / math.sqrt(128) / math.sqrt(4)  # out_proj is scaled down by the square root of the number of layers
    assert 0.9 * bound < mixer["out_proj.weight"].abs().max() <= bound
    assert mixer["in_proj.weight"].abs().max() > 0.9 / math.sqrt(64)
    assert abs(model.embedding.weight.std().item() - 0.02) < 1e-3


def test_h3s_output_begins_as_its_other_projections() -> None:
    """The authors' scaling with depth reaches the MLP alone; with out_proj as small H3 learns recall late."""
    blocks = build_model({"vocab_size": 64, "width": 128, "layers": "[h3] x 8"}).blocks
    mixer, mlp = values(blocks[0].mixer), values(blocks[0].feed_forward)
    assert mixer["q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer["out_proj.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp["down_proj.weight"].std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)


@pytest.mark.parametrize("smallest", [1e-9, 1e-6, 1e-3])
def test_step_sizes_begin_where_the_config_says(smallest: float) -> None:
    """Below the authors' floor of 1e-4 as well."""
    bias = log_uniform_step_sizes(smallest, 10 * smallest)((500,), torch.Generator().manual_seed(0))
    steps = torch.nn.functional.softplus(bias.double())
    assert 0.99 * smallest <= steps.min() < 1.1 * smallest and 9 * smallest < steps.max() <= 10.1 * smallest


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "conba", "conba(variant=linear)", "s4", "s4d", "h3"])
def test_step_sizes_the_wrong_way_round_are_one_line(mixer: str) -> None:
    options = {mixer.partition("(")[0]: {"dt_min": 0.1, "dt_max": 0.01}}
    with pytest.raises(ValueError, match=r"^dt_min 0\.1 exceeds dt_max 0\.01; [^\n]*$"):
        build_model({"vocab_size": 16, "width": 64, "layers": mixer, **options}, device="meta")


def test_weight_decay_spares_vectors_decay_rates_and_filters() -> None:
    model = build_model(CONFIG)
    decayed = weight_decayed(model)
    assert decayed < set(values(model))
    spared = set(values(model)) - decayed
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.D", "blocks.1.mixer.skip", "norm.weight"} <= spared
    # Hyena's filters as in the authors' code
    assert {"blocks.1.mixer.filter.layers.1.weight", "blocks.1.mixer.filter.output"} <= spared
    assert {"embedding.weight", "blocks.1.feed_forward.experts.down", "blocks.0.mixer.conv_weight"} <= decayed
    matrices = [name for name in spared if values(model)[name].dim() > 1]
    assert all(".filter." in name or name.endswith(("A_log", "skip")) for name in matrices)


def test_the_embedding_may_begin_larger_than_the_rest() -> None:
    model = build_model({**CONFIG, "embedding_std": 0.5})
    assert 0.4 < model.embedding.weight.std() < 0.6
    assert build_model(CONFIG).embedding.weight.std() < 0.03


def test_layer_norm_computes_in_the_precision_of_its_weight() -> None:
    norm, x = LayerNorm(16, 1e-5), torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    initialise(norm, seed=0)
    with torch.no_grad():
        norm.weight += torch.linspace(0, 1, 16)
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_hyenas_windows_decay_from_channel_to_channel_and_within_one_from_convolution_to_convolution() -> None:
    model, lag = (
        build_model({"vocab_size": 3, "width": 4, "layers": "[hyena(order=3, max_length=8)]"}),
        torch.tensor([7]),
    )
    filters = model.get_submodule("blocks.0.mixer.filter")
    assert isinstance(filters, ImplicitFilter)
    ends = torch.cat([filters.window(lag, slice(0, 4), convolution) for convolution in (0, 1)], dim=1)
    assert (ends.flatten().diff() < 0).all()


@pytest.mark.parametrize("name", MIXER_CASES)
def test_a_pickled_model_computes_the_same(name: str) -> None:
    model, tokens = make_model(MIXER_CASES[name]), torch.arange(10).unsqueeze(0)
    read = pickle.loads(pickle.dumps(model))
    assert torch.equal(read.logits(tokens), model.logits(tokens))
    assert weight_decayed(read) == weight_decayed(model) == weight_decayed(copy.deepcopy(model))


def test_undeclared_parameters_are_refused() -> None:
    model = build_model(CONFIG)
    model.blocks.append(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"parameter blocks\.4\.weight was not declared"):
        initialise(model, 0)
