"""Checkpoints of transformers, in and out: logits, every gradient, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from longstride.models.interchange import load_config, load_pretrained, save_pretrained

from . import interchange_cases as cases
from .cases import difference
from .interchange_cases import CASES


def compare(case: str, directory: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Greatest relative differences of logits and of a gradient, against transformers."""
    theirs = cases.make(case, dtype)
    theirs.save_pretrained(directory / "model")
    ours = load_pretrained(directory / "model")
    expected, logits = theirs(cases.tokens(), use_cache=False).logits, ours.logits(cases.tokens())
    assert logits.dtype == dtype
    for values in (expected, logits):
        (values * cases.weights().to(dtype)).sum().backward()
    cases.save_gradients(theirs, directory / "gradients")
    gradients = dict(load_pretrained(directory / "gradients").named_parameters())
    worst = 0.0
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        worst = max(worst, difference(parameter.grad, gradients[name].detach()))
    return difference(logits, expected), worst


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_single(case: str, tmp_path: Path) -> None:
    logits, gradients = compare(case, tmp_path, torch.float32)
    assert logits < 1e-5
    assert gradients < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_double(case: str, tmp_path: Path) -> None:
    """With transformers' own float32 taken out, two programs for one model agree to rounding."""
    with cases.in_double(case):
        logits, gradients = compare(case, tmp_path, torch.float64)
    assert logits < 1e-12
    assert gradients < 1e-11


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bitwise(case: str, tmp_path: Path) -> None:
    """Every weight, and so every logit, comes back; transformers misses none and finds none too many."""
    theirs = cases.make(case)
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", layout=cases.layout_of(case))
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(report.values()), report
    assert back.dtype == torch.float32
    expected, state = theirs.state_dict(), back.state_dict()
    assert expected.keys() == state.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    with torch.no_grad():
        logits = [model(cases.tokens(), use_cache=False).logits for model in (theirs, back)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case: str, tmp_path: Path) -> None:
    """What our config.json says is what theirs said, as far as it matters to the model."""
    config = cases.CASES[case]()
    cases.make(case).save_pretrained(tmp_path / "theirs")
    save_pretrained(load_pretrained(tmp_path / "theirs"), tmp_path / "ours", layout=cases.layout_of(case))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    incidental = {"rope_theta", "dtype", "architectures"}
    if config.model_type == "jamba":  # other periods may mean the same layers
        incidental |= {f"{kind}_layer_{number}" for kind in ("attn", "expert") for number in ("period", "offset")}
        back = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
        assert back.layers_block_type == config.layers_block_type
        assert back.layers_num_experts == config.layers_num_experts
    for key in written.keys() - incidental:
        assert getattr(config, key) == written[key], key


def test_a_swapped_pair_is_noticed(tmp_path: Path) -> None:
    """Negative control: gate and up exchanged, which no shape gives away."""
    theirs = cases.make("llama")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    projection = ours.get_parameter("blocks.0.feed_forward.up_proj.weight")
    with torch.no_grad():
        projection.copy_(projection.roll(len(projection) // 2, dims=0))
    assert difference(ours.logits(cases.tokens()), theirs(cases.tokens()).logits) > 1e-2


def test_older_rotary_keys_mean_the_same(tmp_path: Path) -> None:
    case = "llama, every option"
    theirs = cases.make(case)
    theirs.save_pretrained(tmp_path)
    new = load_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 500.0
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = load_pretrained(tmp_path)
    assert old.config == new.config
    assert torch.equal(old.logits(cases.tokens()), new.logits(cases.tokens()))


STATE_SPACES = {
    "mamba": {"d_model": 24, "n_layer": 2, "vocab_size": 45, "ssm_cfg": {"d_state": 4}, "rms_norm": True},
    "mamba2": {
        "d_model": 24,
        "n_layer": 2,
        "vocab_size": 45,
        "pad_vocab_size_multiple": 16,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 4, "headdim": 8, "ngroups": 2},
    },
}


@pytest.mark.parametrize("case", STATE_SPACES)
def test_the_authors_own_layout(case: str, tmp_path: Path) -> None:
    """The same tensors as transformers' but for the embedding's name; vocabularies padded; the tied head repeated."""
    theirs = cases.make(case, torch.float32)
    theirs.tie_weights()
    state = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] = state["backbone.embedding.weight"].clone()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(STATE_SPACES[case]))
    ours = load_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "transformers")
    reference = load_pretrained(tmp_path / "transformers")
    logits = ours.logits(cases.tokens())
    if not reference.config.tie_embeddings:
        reference.get_parameter("head.weight").data.copy_(reference.get_parameter("embedding.weight"))
    assert torch.equal(logits, reference.logits(cases.tokens()))
    save_pretrained(ours, tmp_path / "out", layout="state-spaces")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in written.items())
    assert state.keys() - written.keys() == {"lm_head.weight"}
    assert load_config(tmp_path / "out") == ours.config
