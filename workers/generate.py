"""Decoding: the prompt in the parallel form, split over processes if there are several, then one token at a time.

Every process has the whole model. Each reads its part of a prompt; the state after it goes from the last process to
all, and the first one decodes by the recurrence. Memory does not grow with the text, but for attention's keys and
values and the history of implicit convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from ..data import Corpus, MuLawTokenizer, Tokenizer
from ..data.mu_law import SILENCE
from ..data.sources import expand, recording
from ..models import LanguageModel
from ..models.block import BlockState
from ..parallel import Mesh
from .configuration import ConfigError, Settings
from .liveness import alive
from .process_group import process_group

# Tokens of held-out text to begin with where no prompt is given.
DEFAULT_PROMPT_TOKENS = 32
# Tokens of a prompt that a process reads in one piece.
READ_AT_ONCE = 8192


class SampleConfig(Settings):
    """How text, or sound, is sampled.

    Attributes:
        prompt: text to continue; the beginning of the validation split when not given. Of a run on audio, the path or
            URL of a recording; silence when not given.
        tokens: how many to sample; a second of sound is as many as the sample rate.
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
    prompt = first_tokens(corpus, config.prompt)
    tokens = list(continuation(model, prompt, config, vocabulary=corpus.vocab_size))
    return Sample(corpus.decode(prompt), corpus.decode(tokens))


def first_tokens(corpus: Corpus, prompt: str | None) -> list[int]:
    """Token ids to begin with: the prompt's, or where there is none the first of the corpus's held-out tokens."""
    if prompt is not None or isinstance(corpus.tokenizer, MuLawTokenizer):
        return prompt_tokens(corpus.tokenizer, prompt)
    count = min(DEFAULT_PROMPT_TOKENS, corpus.num_tokens("validation"))
    return [int(token) for token in corpus.read("validation", 0, count)]


def prompt_tokens(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    """The prompt's token ids; of audio those of the recording that it names, of none a sample of silence.

    ConfigError: a text is empty, or a recording more than one file. CorpusError: it cannot be read.
    """
    if isinstance(tokenizer, MuLawTokenizer):
        return _recorded(prompt, tokenizer.sample_rate) if prompt else [SILENCE]
    if not prompt:
        raise ConfigError("sample.prompt is empty; give at least one character")
    return [int(token) for token in tokenizer.encode(prompt)]


def _recorded(url: str, sample_rate: int) -> list[int]:
    files = expand([url], "audio")
    if len(files) > 1:
        raise ConfigError(f"{url} is {len(files)} files; name one recording to continue")
    return [level for levels in recording(files[0], sample_rate) for level in levels.tolist()]


@contextmanager
def readers(rank: int, workers: int) -> Iterator[Mesh | None]:
    """The processes that torchrun started, over which prompts are split; None where there is one."""
    if workers == 1:
        yield None
        return
    with process_group(rank, workers, None, "cpu", None) as device:
        yield Mesh(sequence=workers, device=device)


def continuation(
    model: LanguageModel,
    prompt: Sequence[int],
    config: SampleConfig,
    mesh: Mesh | None = None,
    *,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Token ids after `prompt`, one by one; the same for the same seed. ConfigError: see `check_length`.

    Args:
        mesh: the prompt is split over its sequence axis. Every process calls this, and the first one gets the tokens.
        vocabulary: of the tokenizer; a model may have more ids, which mean nothing (padding to a round number).
    """
    return (token for (token,) in _grow(model, [prompt], [0], config, mesh, vocabulary))


def continuations(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    mesh: Mesh | None = None,
    *,
    vocabulary: int | None = None,
) -> list[list[int]]:
    """Token ids after each of several prompts; those of equal length are decoded together.

    Each is what `continuation` gives for it alone with the seed `config.seed` + its number, up to rounding.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for length in sorted({len(prompt) for prompt in prompts}):
        numbers = [number for number, prompt in enumerate(prompts) if len(prompt) == length]
        rows = [prompts[number] for number in numbers]
        for tokens in _grow(model, rows, numbers, config, mesh, vocabulary):
            for number, token in zip(numbers, tokens, strict=True):
                results[number].append(token)
    return results


@torch.inference_mode()
def _grow(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    config: SampleConfig,
    mesh: Mesh | None,
    vocabulary: int | None,
) -> Iterator[list[int]]:
    """The next tokens of prompts of one length, one token each at a time."""
    check_length(model.max_length, len(prompts[0]), config)
    device = model.output_weight.device
    generators = [torch.Generator().manual_seed(config.seed + number) for number in numbers]
    logits_BV, state = _read(model, torch.tensor(prompts, device=device), mesh)
    for done in range(config.tokens if mesh is None or mesh.rank == 0 else 0):
        rows = zip(logits_BV[:, :vocabulary].cpu(), generators, strict=True)
        tokens = [choose(logits_V, config, generator) for logits_V, generator in rows]
        alive()
        yield tokens
        if done + 1 < config.tokens:
            logits_BV, state = model.step(torch.tensor(tokens, device=device), state)


def _read(model: LanguageModel, prompt_BT: Tensor, mesh: Mesh | None) -> tuple[Tensor, list[BlockState]]:
    """Scores after the prompt and the state there, in pieces: the memory is that of one, however long the prompt."""
    logits_BV, state = torch.empty(0), None
    for piece_BT in prompt_BT.split(READ_AT_ONCE * (mesh.sequence_size if mesh else 1), dim=1):
        length = piece_BT.shape[1]
        if mesh is None or length < mesh.sequence_size:  # fewer tokens than processes: all read all of them
            logits_BV, state = model.prefill(piece_BT, state=state)
        else:
            shard = mesh.shard(length)
            logits_BV, state = model.prefill(piece_BT[:, shard.start : shard.stop], shard, state)
            logits_BV, state = _from_last(logits_BV, state, mesh)
        alive()
    assert state is not None
    return logits_BV, state


def _from_last(logits_BV: Tensor, state: list[BlockState], mesh: Mesh) -> tuple[Tensor, list[BlockState]]:
    """What the last process of the sequence group knows, on all of them."""
    group, is_last = mesh.sequence_group, mesh.sequence_rank == mesh.sequence_size - 1
    last = dist.get_global_rank(group, mesh.sequence_size - 1)
    own = {(): logits_BV} | {
        (index, half, name): tensor
        for index, block_state in enumerate(state)
        for half, tensors in block_state.items()
        for name, tensor in tensors.items()
    }
    shapes = [{key: tensor.shape for key, tensor in own.items()}]
    dist.broadcast_object_list(shapes, src=last, group=group)
    known: list[BlockState] = [{half: {} for half in block_state} for block_state in state]
    for key, tensor in own.items():
        received = tensor if is_last else tensor.new_empty(shapes[0][key])
        received = received.contiguous()
        dist.broadcast(torch.view_as_real(received) if received.is_complex() else received, last, group)
        if key:
            index, half, name = key
            known[index][half][name] = received
        else:
            logits_BV = received
    return logits_BV, known


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
