"""Recurrent decoding on one process: memory does not grow with the text, but for attention's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..data import Corpus
from ..models import LanguageModel
from .configuration import ConfigError, Settings

# Tokens of held-out text to begin with where no prompt is given.
DEFAULT_PROMPT_TOKENS = 32


class SampleConfig(Settings):
    """How text is sampled.

    Attributes:
        prompt: text to continue; the beginning of the validation split when not given.
        tokens: how many to sample.
        temperature: 0 takes the likeliest token each time.
        top_k: sample among the k likeliest; 0 among all.
        top_p: sample among the likeliest tokens whose probabilities sum to at least this.
        seed: of the sampling.
    """

    prompt: str | None = None
    tokens: int = Field(default=256, ge=0)
    temperature: float = Field(default=0.8, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model made of it."""

    prompt: str
    text: str


def sample_text(model: LanguageModel, corpus: Corpus, config: SampleConfig) -> Sample:
    """Continues the prompt. ConfigError: it is empty, not in the corpus's alphabet, or too long for the model."""
    prompt = prompt_tokens(corpus, config.prompt)
    tokens = list(continuation(model, prompt, config))
    return Sample(corpus.decode(prompt), corpus.decode(tokens))


def prompt_tokens(corpus: Corpus, prompt: str | None) -> list[int]:
    """The prompt's token ids."""
    if prompt is None:
        count = min(DEFAULT_PROMPT_TOKENS, corpus.num_tokens("validation"))
        return [int(token) for token in corpus.read("validation", 0, count)]
    if not prompt:
        raise ConfigError("sample.prompt is empty; give at least one character")
    return [int(token) for token in corpus.encode(prompt)]


@torch.inference_mode()
def continuation(model: LanguageModel, prompt: Sequence[int], config: SampleConfig) -> Iterator[int]:
    """Token ids after `prompt`, one by one; the same for the same seed."""
    check_length(model.max_length, len(prompt), config)
    device = model.output_weight.device
    generator = torch.Generator().manual_seed(config.seed)
    state = model.init_state(1)
    logits_V = torch.empty(0)
    for token in prompt:
        logits_BV, state = model.step(torch.tensor([token], device=device), state)
        logits_V = logits_BV[0]
    for _ in range(config.tokens):
        token = choose(logits_V.cpu(), config, generator)
        yield token
        logits_BV, state = model.step(torch.tensor([token], device=device), state)
        logits_V = logits_BV[0]


def check_length(longest: int | None, prompt: int, config: SampleConfig) -> None:
    """ConfigError where `prompt` tokens and those to sample are more than the model is defined for (None: any)."""
    if longest is not None and prompt + config.tokens > longest:
        raise ConfigError(
            f"a prompt of {prompt} tokens and sample.tokens={config.tokens} exceed the model's {longest} positions; "
            f"set sample.tokens={max(0, longest - prompt)}"
        )


def choose(logits_V: Tensor, config: SampleConfig, generator: torch.Generator) -> int:
    """One token id from scores (V,)."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    scores_V, ids_V = (logits_V.double() / config.temperature).sort(descending=True, stable=True)
    if config.top_k:
        scores_V = scores_V[: config.top_k]
    probabilities_V = scores_V.softmax(0)
    # A token stays while those before it sum to less than top_p: the first always does.
    before_V = probabilities_V.cumsum(0) - probabilities_V
    probabilities_V = probabilities_V * (before_V < config.top_p)
    return int(ids_V[int(torch.multinomial(probabilities_V, 1, generator=generator))])
