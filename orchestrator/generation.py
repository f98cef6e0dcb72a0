"""`longstride generate`: a run's weights continue prompts, which processes of torchrun read together.

Text is printed, sound written as WAV.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

import numpy as np

from ..data import MuLawTokenizer, Tokenizer
from ..data.mu_law import LEVELS
from ..data.storage import Folder
from ..models import LanguageModel, distil
from ..parallel import Mesh
from ..workers import Experiment, find_run
from ..workers.configuration import ConfigError, validate
from ..workers.evaluate import TrainedModel, load_run
from ..workers.generate import SampleConfig, continuation, continuations, prompt_tokens, readers
from ..workers.run_tokenizer import run_tokenizer
from . import launcher
from .failures import EchoOfMistake, is_mistake, one_line

# UTF-8 needs at most four bytes a character: more are not waited for.
LONGEST_CHARACTER = 4
# Samples of sound from one word on the terminal to the next.
TOLD_EVERY = 100


def generate(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""
    try:
        with readers(launcher.rank(), launcher.world_size()) as mesh:
            _answer(arguments, mesh)
    except Exception as error:
        if launcher.rank() and is_mistake(error):
            raise EchoOfMistake(one_line(error)) from None
        raise
    return 0


def _answer(arguments: Namespace, mesh: Mesh | None) -> None:
    """One prompt is answered as its tokens come, several one after the other, decoded together."""
    first = mesh is None or mesh.rank == 0
    run = find_run(arguments.run)
    experiment = Experiment.resume(run)
    chosen = {name: getattr(arguments, name) for name in SampleConfig.model_fields if name != "prompt"}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = validate(SampleConfig, experiment.sample.model_dump() | given)
    tokenizer = run_tokenizer(run, experiment.data)
    _check_out(arguments.out, tokenizer, run.name, len(arguments.prompt or ()))
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in _prompts(arguments, experiment, tokenizer)]
    trained = load_run(run, experiment, checkpoint=arguments.checkpoint)
    model, notes = _model(trained, arguments.modes)
    for line in notes if first else ():
        print(f"note: {line}", file=sys.stderr)
    if len(prompts) > 1:
        answers = continuations(model, prompts, config, mesh, vocabulary=tokenizer.vocab_size)
        for prompt, tokens in zip(prompts, answers, strict=True) if first else ():
            print(f"{tokenizer.decode(prompt)}{tokenizer.decode(tokens)}\n")
        return
    tokens = continuation(model, prompts[0], config, mesh, vocabulary=tokenizer.vocab_size)
    if not first:
        assert not list(tokens)
    elif isinstance(tokenizer, MuLawTokenizer):
        _write_sound(arguments.out, tokenizer.sample_rate, prompts[0], _shown(tokens, config.tokens))
    else:
        print(tokenizer.decode(prompts[0]), end="", flush=True)
        for text in _pieces(tokenizer, tokens):
            print(text, end="", flush=True)
        print()


def _prompts(arguments: Namespace, experiment: Experiment, tokenizer: Tokenizer) -> list[str | None]:
    """What is to be continued; None: nothing, which sound alone can begin with."""
    given = arguments.prompt or [experiment.sample.prompt]
    if given == [None] and not isinstance(tokenizer, MuLawTokenizer):
        raise ConfigError("the run's sample.prompt is null; give --prompt TEXT to continue")
    return given


def _check_out(out: str | None, tokenizer: Tokenizer, run: str, num_prompts: int) -> None:
    """ConfigError: --out is missing or does not fit what the run makes."""
    if not isinstance(tokenizer, MuLawTokenizer):
        if out is not None:
            raise ConfigError(f"--out {out} is for sound, and run {run} makes text, which is printed; leave it out")
    elif out is None:
        raise ConfigError(f"run {run} makes sound; give --out FILE.wav to write it to")
    elif not out.lower().endswith(".wav"):
        raise ConfigError(f"--out {out}: sound is written as WAV; give a name that ends in .wav")
    elif num_prompts > 1:
        raise ConfigError(f"--out {out} holds one sound, not {num_prompts}; give one --prompt")


def _write_sound(out: str, sample_rate: int, prompt: list[int], tokens: Iterator[int]) -> None:
    """The recording and how it goes on, less the tokens that end a recording."""
    from ..data.audio import wav  # loads the libraries for sound

    levels = np.array([token for token in (*prompt, *tokens) if token < LEVELS], dtype=np.uint8)
    folder, slash, name = out.rpartition("/")
    Folder(folder or f"{slash}.").write(name, wav(levels, sample_rate))
    print(f"{out}: {len(levels) / sample_rate:.2f} s of sound at {sample_rate:,} Hz")


def _shown(tokens: Iterator[int], total: int) -> Iterator[int]:
    """The tokens, with how many there are on a terminal's live line."""
    for done, token in enumerate(tokens, start=1):
        if sys.stderr.isatty() and (done % TOLD_EVERY == 0 or done == total):
            end = "\r\033[K" if done == total else ""
            print(f"\r{done:,}/{total:,} samples{end}", end="", file=sys.stderr, flush=True)
        yield token


def _model(trained: TrainedModel, modes: int | None) -> tuple[LanguageModel, list[str]]:
    """What decodes, and what to say of it."""
    if modes is None:
        return trained.model, trained.notes
    if modes < 1:
        raise ConfigError(f"--modes {modes}: give at least 1")
    model, errors = distil(trained.model, modes)
    lines = [f"layer {index}: {modes} modes miss {error:.1e} of the filters" for index, error in errors.items()]
    return model, [*trained.notes, *lines]


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as its tokens come, never half a character."""
    waiting: list[int] = []
    for token in tokens:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(waiting) >= LONGEST_CHARACTER:
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)
