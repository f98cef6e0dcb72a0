"""Files: sharded ones, broken ones, refused ones; and that no more than a buffer of them is in memory."""

from __future__ import annotations

import json
import shutil
import struct
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longstride.models import ModelConfig, build_model, load_preset
from longstride.models.interchange import (
    LAYOUTS,
    InterchangeError,
    files,
    load_config,
    load_into,
    load_pretrained,
    loading,
    save_pretrained,
)
from longstride.models.interchange.checkpoint import CheckpointReader
from longstride.models.interchange.files import SafetensorsReader
from longstride.models.interchange.layout import parse_config, tensor_map, write_config

from . import interchange_cases as cases

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "width": 16,
    "layers": "[attention] x 2",
    "attention": {"heads": 4, "kv_heads": 2},
    "mlp": {"hidden": 24},
    "tie_embeddings": False,
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_pretrained(build_model(TINY), tmp_path / "tiny", layout="llama")
    return tmp_path / "tiny"


def edit(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_many_files_theirs(tmp_path: Path) -> None:
    theirs = cases.make("jamba")
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = load_pretrained(tmp_path / "one").state_dict(), load_pretrained(tmp_path / "many").state_dict()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_many_files_ours(tmp_path: Path) -> None:
    theirs = cases.make("mixtral")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours", layout="mixtral", file_bytes=20_000)
    written = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(written) > 3
    assert max(path.stat().st_size for path in written) < 24_000
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * ours.num_parameters()
    for path in written:
        assert {key for key, name in index["weight_map"].items() if name == path.name} == load_file(path).keys()
    back = type(theirs).from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model(TINY, dtype=torch.float64)
    save_pretrained(model, tmp_path / "out", layout="llama", dtype=dtype)
    kept = load_pretrained(tmp_path / "out")
    wide = load_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(kept.get_parameter(name), parameter.to(dtype))
        assert torch.equal(wide.get_parameter(name), parameter.to(dtype).float())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_mixed_dtypes_are_widened(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}
    save_file(mixed, directory / "model.safetensors")
    assert load_pretrained(directory).norm.weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_a_stored_copy_of_a_tied_head(tied: bool, tmp_path: Path) -> None:
    save_pretrained(build_model({**TINY, "tie_embeddings": True}), tmp_path / "out", layout="llama")
    state = load_file(tmp_path / "out" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * (1.0 if tied else 2.0)
    save_file(state, tmp_path / "out" / "model.safetensors")
    if tied:
        assert load_pretrained(tmp_path / "out").head is None
    else:
        with pytest.raises(InterchangeError, match="different from what it is tied to: lm_head"):
            load_pretrained(tmp_path / "out")


def test_one_error_names_every_tensor_that_does_not_fit(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    del state["model.norm.weight"], state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(16)
    state["model.layers.0.rotary_emb.inv_freq"] = torch.zeros(2)  # older files have it; it says nothing
    state["extra"] = torch.zeros(2)
    state["lm_head.weight"] = torch.zeros(16, 40)
    state["model.layers.0.mlp.down_proj.weight"] = torch.zeros(16, 23)
    save_file(state, directory / "model.safetensors")
    model = build_model(TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for attempt in (lambda: load_pretrained(directory), lambda: load_into(model, directory)):
        with pytest.raises(InterchangeError) as caught:
            attempt()
        assert str(caught.value) == (
            f"{directory} does not fit its config as llama: "
            "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
            "unknown: extra, model.layers.0.self_attn.q_proj.bias; "
            "misshapen: model.layers.0.mlp.down_proj.weight (16, 23) instead of (16, 24), "
            "lm_head.weight (16, 40) instead of (40, 16)"
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_model_is_refused(directory: Path) -> None:
    longer = {**TINY, "attention": {**TINY["attention"], "rotary_base": 1e6}}
    with pytest.raises(
        InterchangeError, match=r"another model: layers 0, 1: attention.rotary_base is 1000000.0 here and"
    ):
        load_into(build_model(longer), directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "in no known layout (model_type gpt2); known are mamba, "),
        ({"hidden_act": "relu"}, "hidden_act=relu is not supported; only silu or swish is"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}},
            "rope_parameters={'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0} is not supported",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling={'type': 'linear'"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 kv_heads"),
    ],
)
def test_configs_that_are_not_understood(changes: dict[str, Any], message: str, directory: Path) -> None:
    edit(directory, **changes)
    with pytest.raises(ValueError) as caught:
        load_pretrained(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(name: str, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / name)
    message = rf"holds pickle files \({name}\), which can run code when they are read; convert them to safetensors"
    with pytest.raises(InterchangeError, match=message):
        load_pretrained(directory)
    with pytest.raises(InterchangeError, match=message):
        load_pretrained(directory / name)
    (directory / "config.json").unlink()
    with pytest.raises(InterchangeError, match=message):
        load_pretrained(directory)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match=r"no directory .*nowhere: give one with config\.json"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(InterchangeError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InterchangeError, match="has no safetensors files"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InterchangeError, match=r"config\.json is not JSON"):
        load_pretrained(tmp_path)


def header(**fields: Any) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "unpack"),
        (struct.pack("<Q", 10**12) + b"{}", "its header would be 1000000000000 bytes long"),
        (struct.pack("<Q", 2) + b"[]", "its header is no JSON object"),
        (header(dtype="F8_E4M3"), "a has dtype F8_E4M3"),
        (header(data_offsets=[0, 16]), "a lies outside the file"),
        (header(data_offsets=[-8, 0]), "a lies outside the file"),
        (header(data_offsets=[0, 4]), r"a of shape \(2,\) cannot have 4 bytes"),
        (header(shape=[-2]), "a lies outside the file"),
        (header()[:-1], "a lies outside the file"),
    ],
)
def test_broken_files_are_noticed(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(content)
    with pytest.raises(InterchangeError, match=f"is not a whole safetensors file: .*{message}"):
        SafetensorsReader(tmp_path / "broken.safetensors")


def test_indices_that_lie(tmp_path: Path) -> None:
    save_pretrained(build_model(TINY), tmp_path / "out", layout="llama", file_bytes=5_000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], "more": "model-9.safetensors"}}))
    with pytest.raises(InterchangeError, match=r"lacks files that its index names: model-9\.safetensors"):
        load_pretrained(tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {"more": "../secret.safetensors"}}))
    with pytest.raises(InterchangeError, match="which is not a file beside it"):
        load_pretrained(tmp_path / "out")
    index.unlink()
    first, *_ = sorted((tmp_path / "out").glob("*.safetensors"))
    shutil.copy(first, tmp_path / "out" / "again.safetensors")
    with pytest.raises(InterchangeError, match="twice"):
        load_pretrained(tmp_path / "out")


def test_models_that_a_layout_cannot_hold(tmp_path: Path) -> None:
    cases_and_messages = {
        "llama": (
            {"layers": "[mamba, attention]"},
            "it has layers that llama has not, mamba\\+mlp; nor as any other .*, of which jamba is nearest: ",
        ),
        "mixtral": (
            {"layers": "[attention]", "feed_forward": "moe", "moe": {"renormalise": False}},
            "layer 0: moe.renormalise is False here and True there",
        ),
        "jamba": (
            {"layers": "[mamba(inner_norms=true), attention(window=9)]"},
            "attention.rotary_base is 10000.0 here and None there, attention.window is 9 here and None there",
        ),
        "mamba": (
            {"layers": "[mamba] x 2", "feed_forward": "none", "norm": "layer"},
            "norm is layer here and rms there; state-spaces can hold it",
        ),
        "state-spaces": (
            {"layers": "[mamba, hyena+moe, attention+mlp, gau, gau]", "feed_forward": "none"},
            "it has layers that state-spaces has not, hyena\\+moe, attention\\+mlp, gau\\+none; nor as any other",
        ),
        "evo2": (
            {"layers": "[hyena_se, attention] x 3"},
            "layer 0: mlp.kind is swiglu here and geglu there; layers 1, 2, 3, ...: mlp.kind is swiglu",
        ),
    }
    for layout, (description, message) in cases_and_messages.items():
        model = build_model({"vocab_size": 16, "width": 16, **description})
        with pytest.raises(InterchangeError, match=f"the model cannot be stored as {layout}: .*{message}") as refusal:
            save_pretrained(model, tmp_path / layout, layout=layout)
        assert len(str(refusal.value)) < 500
        assert not (tmp_path / layout).exists()
    with pytest.raises(InterchangeError, match="no layout 'lama'; there are mamba"):
        save_pretrained(build_model(TINY), tmp_path / "out", layout="lama")


def test_nothing_is_overwritten(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InterchangeError, match="holds a checkpoint already"):
        save_pretrained(build_model(TINY), directory, layout="llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(InterchangeError, match="is a file"):
        save_pretrained(build_model(TINY), tmp_path / "file", layout="llama")
    with pytest.raises(InterchangeError, match="cannot be written"):
        save_pretrained(build_model(TINY), tmp_path / "file" / "below", layout="llama")


def test_an_interrupted_save_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def failing(self: files.SafetensorsWriter, key: str, tensor: Tensor) -> None:
        written.append(key)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.SafetensorsWriter, "write", failing)
    with pytest.raises(InterchangeError, match="out cannot be written: No space left on device"):
        save_pretrained(build_model(TINY), tmp_path / "out", layout="llama")
    with pytest.raises(InterchangeError, match=r"has no config\.json"):
        load_pretrained(tmp_path / "out")


def test_every_element_is_read_once_in_small_pieces(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a buffer of 1 KiB no read is longer than it, and the same values arrive."""
    expected = load_pretrained(directory).state_dict()
    monkeypatch.setattr(files, "BUFFER_BYTES", 1024)
    model = build_model(TINY, seed=1)
    with CheckpointReader(directory) as reader:
        layout = LAYOUTS["llama"]
        loading.fill(model, loading.checked_map(model, layout, reader), reader)
        assert reader.largest_read <= 1024
        assert reader.bytes_read == 4 * model.num_parameters()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("layout", ["jamba", "mixtral"])
def test_saving_makes_one_tensor_at_a_time(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written was made just before, and what was written before it is gone."""
    alive: list[Any] = []

    def write(self: files.SafetensorsWriter, key: str, tensor: Tensor) -> None:
        assert not [other for other in alive if other() is not None]
        alive.append(weakref.ref(tensor))
        self.waiting.pop(0)

    monkeypatch.setattr(files.SafetensorsWriter, "write", write)
    cases.make(layout).save_pretrained(tmp_path / "in")
    save_pretrained(load_pretrained(tmp_path / "in"), tmp_path / "out", layout=layout)
    assert len(alive) > 40


PRESETS = [
    ("llama-2-7b", "llama"),
    ("llama-2-70b", "llama"),
    ("mixtral-8x7b", "mixtral"),
    ("jamba-v0.1", "jamba"),
    ("mamba-2.8b", "mamba"),
    ("mamba-2.8b", "state-spaces"),
    ("mamba2-2.7b", "mamba2"),
    ("mamba2-2.7b", "state-spaces"),
    ("rwkv4-14b", "rwkv"),
    ("striped-hyena-7b", "striped-hyena-7b"),
]


@pytest.mark.parametrize(("preset", "name"), PRESETS)
def test_presets_can_be_described(preset: str, name: str) -> None:
    """The published models fit their layouts; nothing is allocated."""
    layout, config = LAYOUTS[name], load_preset(preset)
    written = write_config(layout, config)
    assert isinstance(parse_config(layout, written, "test"), ModelConfig)
    tensors = tensor_map(layout, config)
    assert (
        sum(torch.Size(shape).numel() for shape in tensors.shapes.values())
        == build_model(config, device="meta").num_parameters()
    )
