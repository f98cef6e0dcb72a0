"""`longstride generate`: a run's weights continue prompts, which processes of torchrun read together."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

from ..data import Tokenizer
from ..models import LanguageModel, distil
from ..parallel import Mesh
from ..workers import Experiment, find_run
from ..workers.configuration import ConfigError, validate
from ..workers.evaluate import TrainedModel, load_run
from ..workers.generate import SampleConfig, continuation, continuations, prompt_tokens, readers
from ..workers.run_tokenizer import run_tokenizer
from . import launcher
from .failures import EchoOfMistake, is_mistake

# UTF-8 needs at most four bytes a character: more are not waited for.
LONGEST_CHARACTER = 4


def generate(arguments: Namespace) -> int:
    """Every process of a launcher comes here; the first one speaks."""
    try:
        with readers(launcher.rank(), launcher.world_size()) as mesh:
            _answer(arguments, mesh)
    except Exception as error:
        if launcher.rank() and is_mistake(error):
            raise EchoOfMistake from None
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
    trained = load_run(run, experiment, checkpoint=arguments.checkpoint)
    model, notes = _model(trained, arguments.modes)
    for line in notes if first else ():
        print(f"note: {line}", file=sys.stderr)
    tokenizer = run_tokenizer(run, trained.corpus)
    prompts = [prompt_tokens(trained.corpus, prompt, tokenizer) for prompt in arguments.prompt]
    if len(prompts) > 1:
        answers = continuations(model, prompts, config, mesh, vocabulary=tokenizer.vocab_size)
        for prompt, tokens in zip(prompts, answers, strict=True) if first else ():
            print(f"{tokenizer.decode(prompt)}{tokenizer.decode(tokens)}\n")
        return
    tokens = continuation(model, prompts[0], config, mesh, vocabulary=tokenizer.vocab_size)
    pieces = _pieces(tokenizer, tokens)
    if not first:
        assert not list(pieces)
        return
    print(tokenizer.decode(prompts[0]), end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()


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
