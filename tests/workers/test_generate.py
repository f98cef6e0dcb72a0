"""Sampling: what may be chosen, and that the same seed says the same."""

from __future__ import annotations

import pytest
import torch

from longstride.data import open_corpus
from longstride.models import build_model
from longstride.parallel import Mesh, SequenceShard
from longstride.workers import ConfigError, generate
from longstride.workers.generate import (
    SampleConfig,
    choose,
    continuation,
    continuations,
    first_tokens,
    prompt_tokens,
    sample_text,
)
from tests.distributed import run_ranks

from .tiny import TINY

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0])  # probabilities .090 .665 .245 (and .0012)


def chosen(config: SampleConfig, draws: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose(LOGITS, config, generator) for _ in range(draws)}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (SampleConfig(temperature=0), {1}),
        (SampleConfig(temperature=1, top_p=1, top_k=1), {1}),
        (SampleConfig(temperature=1, top_p=1, top_k=2), {1, 2}),
        (SampleConfig(temperature=1, top_p=0.5), {1}),
        (SampleConfig(temperature=1, top_p=0.7), {1, 2}),
        (SampleConfig(temperature=5, top_p=1), {0, 1, 2, 3}),
        (SampleConfig(temperature=1e-6, top_p=1), {1}),
    ],
)
def test_what_may_be_chosen(config: SampleConfig, tokens: set[int]) -> None:
    assert chosen(config) == tokens


def test_frequencies_follow_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([choose(LOGITS, SampleConfig(temperature=1, top_p=1), generator) for _ in range(4000)])
    assert torch.bincount(draws, minlength=4) / 4000 == pytest.approx(LOGITS.softmax(0), abs=0.03)


def test_the_likeliest_continuation_is_that_of_the_whole_sequence() -> None:
    model = build_model(TINY["model"], dtype=torch.float64)
    prompt = list(b"import os")
    tokens = list(continuation(model, prompt, SampleConfig(tokens=10, temperature=0)))
    for _ in range(2):
        assert list(continuation(model, prompt, SampleConfig(tokens=10, temperature=0))) == tokens
    whole = torch.tensor([prompt + tokens])
    with torch.inference_mode():
        best = model.logits(whole, SequenceShard.whole(whole.shape[1]))[0].argmax(-1).tolist()
    assert best[len(prompt) - 1 : -1] == tokens


def test_the_seed_decides() -> None:
    model = build_model(TINY["model"])
    first, second, other = (
        list(continuation(model, [65], SampleConfig(tokens=20, temperature=1, seed=seed))) for seed in (1, 1, 2)
    )
    assert first == second != other


def test_prompts() -> None:
    corpus = open_corpus("python-source")
    assert bytes(prompt_tokens(corpus.tokenizer, "def é")) == bytes(first_tokens(corpus, "def é")) == "def é".encode()
    assert first_tokens(corpus, None) == corpus.read("validation", 0, 32).tolist()
    with pytest.raises(ConfigError, match="prompt is empty"):
        first_tokens(corpus, "")
    sample = sample_text(build_model(TINY["model"]), corpus, SampleConfig(prompt="x = ", tokens=3))
    assert sample.prompt == "x = "


def test_too_long_a_text_is_one_line() -> None:
    model = build_model(TINY["model"])
    with pytest.raises(ConfigError, match=r"exceed the model's 64 positions; set sample\.tokens=60"):
        list(continuation(model, [1, 2, 3, 4], SampleConfig(tokens=100)))


def test_ids_that_the_tokenizer_lacks_are_never_chosen() -> None:
    """A model's vocabulary may be padded; here an untrained model has twice as many ids as bytes."""
    model = build_model({**TINY["model"], "vocab_size": 512})
    config = SampleConfig(tokens=40, temperature=5, top_p=1)
    assert max(continuation(model, [65], config)) >= 256
    assert max(continuation(model, [65], config, vocabulary=256)) < 256


def test_several_prompts_are_each_as_if_alone() -> None:
    """Of different lengths, with seeds of their own; the same prompt again says something else."""
    model = build_model(TINY["model"], dtype=torch.float64)
    prompts = [list(b"import os"), list(b"x"), list(b"class A(B"), list(b"x")]
    config = SampleConfig(tokens=12, temperature=1, top_p=0.9, top_k=50, seed=4)
    together = continuations(model, prompts, config)
    for number, prompt in enumerate(prompts):
        alone = config.model_copy(update={"seed": 4 + number})
        assert together[number] == list(continuation(model, prompt, alone))
    assert together[1] != together[3]


def test_a_prompt_is_read_at_once_or_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never token by token; and the pieces do not show."""
    model = build_model(TINY["model"], dtype=torch.float64)
    prompt = list(b"def f(a, b):\n    return a + b\n")
    config = SampleConfig(tokens=8, temperature=0)
    steps = 0
    step = model.step

    def counted(*arguments: object) -> object:
        nonlocal steps
        steps += 1
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "step", counted)
    at_once = list(continuation(model, prompt, config))
    assert steps == config.tokens - 1  # the last token is not read again
    monkeypatch.setattr("longstride.workers.generate.READ_AT_ONCE", 7)
    assert list(continuation(model, prompt, config)) == at_once


EVERY_STATE = {
    "vocab_size": 256,
    "width": 16,
    "layers": "[mamba, hyena(max_length=64), attention(heads=2), s4(state=4), h3(state=4), retnet(heads=2), "
    "rwkv7(head_dim=8), gau(key_dim=4), flash(key_dim=4, chunk=5), lstm, rwkv4, modal_hyena, conba(variant=linear)]",
    "feed_forward": "channel_mix",
    "init_std": 0.3,
}
PROMPTS = [list(b"def f(a, b):\n    return a"), list(b"x"), list(b"class A(B): pass")]


def split_reading(rank: int, world_size: int, at_once: int) -> list[list[int]]:
    generate.READ_AT_ONCE = at_once
    model = build_model(EVERY_STATE, dtype=torch.float64)
    return continuations(model, PROMPTS, SampleConfig(tokens=6, temperature=1, seed=2), Mesh(sequence=world_size))


@pytest.mark.parametrize("at_once", [8192, 5])
def test_processes_share_the_reading_of_a_prompt(at_once: int) -> None:
    """At once or in pieces; one prompt has fewer tokens than there are processes. The first process decodes."""
    alone = continuations(
        build_model(EVERY_STATE, dtype=torch.float64), PROMPTS, SampleConfig(tokens=6, temperature=1, seed=2)
    )
    first, *others = run_ranks(split_reading, 3, at_once)
    assert first == alone and all(len(tokens) == 6 for tokens in alone)
    assert others == [[[], [], []]] * 2
