"""`longstride presets` and `longstride settings`: what a config may say, from the classes and files that define it."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from difflib import get_close_matches

from ..models import ModelConfig, build_model, list_presets, preset_text
from ..workers import Experiment
from ..workers.meanings import section_at, settings_of, summary
from .tables import show


def presets(arguments: Namespace) -> int:
    """All presets, a line each; of one that is named, its description."""
    if arguments.name is not None:
        print(preset_text(arguments.name), end="")
        return 0
    show(
        ("PRESET", "PARAMETERS", "ACTIVE", "VOCABULARY", "LONGEST", "LAYERS"),
        [_preset(name) for name in list_presets()],
    )
    return 0


def settings(arguments: Namespace) -> int:
    """The settings of a section, or those whose names hold some text. ValueError: there are none."""
    asked = (arguments.prefix or "").strip(".")
    found = list(settings_of(Experiment))
    section = section_at(Experiment, asked) if asked else Experiment
    if section is not None:
        chosen = [each for each in found if not asked or each.name == asked or each.name.startswith(f"{asked}.")]
        if asked:
            print(f"{asked}: {summary(section)}\n")
    else:
        chosen = [each for each in found if asked in each.name]
        if not chosen:
            raise ValueError(f"no setting is called {asked!r}{_nearest(asked, [each.name for each in found])}")
    if chosen:
        show(
            ("SETTING", "TYPE", "DEFAULT", "MEANING"),
            [(each.name, each.kind, each.default, each.meaning) for each in chosen],
        )
    return 0


def layers_in_short(config: ModelConfig) -> str:
    """28 mamba, 4 attention; 16 with moe"""
    mixers = Counter(layer.mixer for layer in config.plan)
    after = Counter(layer.feed_forward or config.feed_forward for layer in config.plan)
    parts = ", ".join(f"{count} {name}" for name, count in mixers.most_common())
    return f"{parts}; {after['moe']} with moe" if after["moe"] else parts


def _preset(name: str) -> tuple[str, ...]:
    model = build_model(name, device="meta")
    total, active, longest = model.num_parameters(), model.num_active_parameters(), model.max_length
    sizes = (_count(total), _count(active), f"{model.config.vocab_size:,}")
    return (name, *sizes, "any" if longest is None else f"{longest:,}", layers_in_short(model.config))


def _count(parameters: int) -> str:
    """129.1M"""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= size:
            return f"{parameters / size:.1f}{unit}"
    return str(parameters)


def _nearest(asked: str, names: list[str]) -> str:
    parts = sorted({part for name in names for part in (name, name.rpartition(".")[0], name.rpartition(".")[2])} - {""})
    near = get_close_matches(asked, parts, n=1)
    return f"; did you mean {near[0]}?" if near else "; `longstride settings` lists all"
