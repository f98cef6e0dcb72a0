"""Small random models of transformers to hold the checkpoints against, and transformers in double precision.

transformers computes some things in float32 whatever the model's dtype: norms, softmax, decay rates, the scan's
inputs, the logits of Mamba. Two exact programs would then differ by 1e-7 in a double model. `in_double` makes it
compute those in double too, so that a comparison shows what really differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 48


def llama(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(vocab_size=VOCAB, **{**sizes, "num_key_value_heads": 2, **options})


def mixtral(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.MixtralConfig(
        vocab_size=VOCAB, **{**sizes, "num_key_value_heads": 2, "num_local_experts": 4, **options}
    )


def jamba(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 6, "num_attention_heads": 4}
    periods = {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    # transformers gives the embedding of a padding token no gradient
    more = {"num_key_value_heads": 2, "num_experts": 4, "mamba_d_state": 4, "pad_token_id": None}
    return transformers.JambaConfig(vocab_size=VOCAB, **{**sizes, **periods, **more, **options})


def mamba(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaConfig(vocab_size=VOCAB, **{**sizes, **options})


def mamba2(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "num_heads": 6, "head_dim": 8, "n_groups": 2}
    return transformers.Mamba2Config(vocab_size=VOCAB, **{**sizes, "pad_token_id": None, **options})


def rwkv(**options: Any) -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "rescale_every": 0}
    return transformers.RwkvConfig(vocab_size=VOCAB, **{**sizes, **options})


CASES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": llama,
    "llama, every option": lambda: llama(
        attention_bias=True,
        mlp_bias=True,
        head_dim=10,
        tie_word_embeddings=True,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    ),
    "mixtral": mixtral,
    "mixtral, three experts a token, own head width": lambda: mixtral(num_experts_per_tok=3, head_dim=8),
    "mixtral, in a window": lambda: mixtral(sliding_window=7),
    "jamba": jamba,
    "jamba without experts": lambda: jamba(num_experts=1, num_hidden_layers=3, mamba_proj_bias=True),
    "jamba, no attention, tied": lambda: jamba(attn_layer_period=9, attn_layer_offset=8, tie_word_embeddings=True),
    "rwkv": rwkv,
    "rwkv, every option": lambda: rwkv(intermediate_size=40, tie_word_embeddings=True),
    "mamba2": mamba2,
    "mamba2, every option": lambda: mamba2(
        use_bias=True,
        use_conv_bias=False,
        conv_kernel=3,
        expand=3,
        num_heads=9,
        n_groups=1,
        tie_word_embeddings=True,
        layer_norm_epsilon=1e-3,
    ),
    "mamba": mamba,
    "mamba, every option": lambda: mamba(
        use_bias=True,
        use_conv_bias=False,
        conv_kernel=3,
        expand=3,
        time_step_rank=5,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
}


def layout_of(case: str) -> str:
    return case.split(",")[0].split(" ")[0]


def make(case: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with no value where it would hide a mistake (zero biases, unit norms)."""
    config = CASES[case]()
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the grouped one has no double precision
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))


def weights() -> Tensor:
    """A random linear function of the logits, whose gradients are compared."""
    return torch.randn(2, 19, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def save_gradients(model: Any, directory: Path) -> None:
    """Write a checkpoint with the gradients in place of the parameters: what reads one reads the other."""
    state = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    model.save_pretrained(directory)


def modeling(model: nn.Module) -> ModuleType:
    return sys.modules[type(model).__module__]


@contextmanager
def in_double(case: str) -> Iterator[None]:
    """transformers takes float64 wherever it says float32."""
    kind = layout_of(case)
    module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["torch"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", _DoubleTorch("torch"))
        patch.setattr(Tensor, "float", Tensor.double)
        yield


class _DoubleTorch(ModuleType):
    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
