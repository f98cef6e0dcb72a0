"""`longstride generate`: a run's newest weights continue prompts."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

from ..data import Tokenizer
from ..workers import Experiment, find_run
from ..workers.configuration import validate
from ..workers.evaluate import load_run
from ..workers.generate import SampleConfig, continuation, continuations, prompt_tokens
from ..workers.interchange import run_tokenizer

# UTF-8 needs at most four bytes a character: more are not waited for.
LONGEST_CHARACTER = 4


def generate(arguments: Namespace) -> int:
    """One prompt is answered as its tokens come, several one after the other, decoded together."""
    run = find_run(arguments.run)
    experiment = Experiment.resume(run)
    chosen = {name: getattr(arguments, name) for name in SampleConfig.model_fields if name != "prompt"}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = validate(SampleConfig, experiment.sample.model_dump() | given)
    trained = load_run(run, experiment)
    for line in trained.notes:
        print(f"note: {line}", file=sys.stderr)
    tokenizer = run_tokenizer(run, trained.corpus)
    prompts = [prompt_tokens(trained.corpus, prompt, tokenizer) for prompt in arguments.prompt]
    if len(prompts) > 1:
        for prompt, tokens in zip(prompts, continuations(trained.model, prompts, config), strict=True):
            print(f"{tokenizer.decode(prompt)}{tokenizer.decode(tokens)}\n")
        return 0
    print(tokenizer.decode(prompts[0]), end="", flush=True)
    for text in _pieces(tokenizer, continuation(trained.model, prompts[0], config)):
        print(text, end="", flush=True)
    print()
    return 0


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
