"""Decoding on one process: the prompt in the parallel form, then one token at a time by the recurrence.

Memory does not grow with the text, but for attention's keys and values and the history of implicit convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from ..data import Corpus, Tokenizer
from ..models import LanguageModel
from ..models.block import BlockState
from .configuration import ConfigError, Settings

# Tokens of held-out text to begin with where no prompt is given.
DEFAULT_PROMPT_TOKENS = 32
# Tokens of a prompt that are read in one piece.
READ_AT_ONCE = 8192


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


def prompt_tokens(corpus: Corpus, prompt: str | None, tokenizer: Tokenizer | None = None) -> list[int]:
    """The prompt's token ids, by the corpus's tokenizer or the one given."""
    if prompt is None:
        count = min(DEFAULT_PROMPT_TOKENS, corpus.num_tokens("validation"))
        return [int(token) for token in corpus.read("validation", 0, count)]
    if not prompt:
        raise ConfigError("sample.prompt is empty; give at least one character")
    return [int(token) for token in (tokenizer or corpus.tokenizer).encode(prompt)]


def continuation(model: LanguageModel, prompt: Sequence[int], config: SampleConfig) -> Iterator[int]:
    """Token ids after `prompt`, one by one; the same for the same seed. ConfigError: see `check_length`."""
    return (token for (token,) in _grow(model, [prompt], [0], config))


def continuations(model: LanguageModel, prompts: Sequence[Sequence[int]], config: SampleConfig) -> list[list[int]]:
    """Token ids after each of several prompts; those of equal length are decoded together.

    Each is what `continuation` gives for it alone with the seed `config.seed` + its number, up to rounding.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        for tokens in _grow(model, [prompts[number] for number in numbers], numbers, config):
            for number, token in zip(numbers, tokens, strict=True):
                results[number].append(token)
    return results


@torch.inference_mode()
def _grow(
    model: LanguageModel, prompts: Sequence[Sequence[int]], numbers: Sequence[int], config: SampleConfig
) -> Iterator[list[int]]:
    """The next tokens of prompts of one length, one token each at a time."""
    check_length(model.max_length, len(prompts[0]), config)
    device = model.output_weight.device
    generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
    logits_BV, state = _read(model, torch.tensor(prompts, device=device))
    for done in range(config.tokens):
        rows = zip(logits_BV.cpu(), generators, strict=True)
        tokens = [choose(logits_V, config, generator) for logits_V, generator in rows]
        yield tokens
        if done + 1 < config.tokens:
            logits_BV, state = model.step(torch.tensor(tokens, device=device), state)


def _read(model: LanguageModel, prompt_BT: Tensor) -> tuple[Tensor, list[BlockState]]:
    """Scores after the prompt and the state there, in pieces: the memory is that of one, however long the prompt."""
    logits_BV, state = torch.empty(0), None
    for piece_BT in prompt_BT.split(READ_AT_ONCE, dim=1):
        logits_BV, state = model.prefill(piece_BT, state=state)
    assert state is not None
    return logits_BV, state


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
