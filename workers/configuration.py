"""From YAML and `key=value` overrides to checked settings, with errors a person can act on.

Every class of settings is a pydantic model that lives with the code it configures. This file knows none of
them: it reads, overrides, validates and turns pydantic's reports into one line that names the dotted path.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ..data.credentials import mask_credentials

# A setting of the same name in more places than these says little about what was meant.
MOST_PLACES = 3
Tree = dict[str, Any]
Expand = Callable[[str, Any], Tree | None]
ModelT = TypeVar("ModelT", bound=BaseModel)


class ConfigError(ValueError):
    """A mistake in an experiment's settings: one line, with the key, the value and the fix. Secrets in URLs masked."""

    def __init__(self, message: str) -> None:
        super().__init__(mask_credentials(message))


class Settings(BaseModel):
    """Base of the settings of this room: unknown keys are refused, defaults are checked too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def parse_yaml(text: str, source: str) -> Tree:
    """A mapping from YAML (safe loader, repeated keys refused). `source` names the text in errors."""
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        if "'\\t'" in problem:
            problem += "; indent with spaces"
        raise ConfigError(f"{source}{where}: not valid YAML: {problem}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected keys and values, found a {type(tree).__name__}")
    return tree


def apply_overrides(tree: Tree, overrides: Sequence[str], expand: Expand | None = None) -> Tree:
    """A copy of `tree` with every `dotted.path=value` put in, in order; values are typed as YAML types them.

    `expand(path, value)` may turn a value that an override reaches into (a preset's name) into its section.
    """
    result = _copy(tree)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as train.steps=100")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            quote = (
                "quote what begins with *, as in ['*.bias']" if "*" in text else f"for a text write '{path}=\"{text}\"'"
            )
            raise ConfigError(f"override {override!r}: the value is not valid YAML; {quote}") from None
        _put(result, keys, value, override, expand or (lambda path, value: None))
    return result


def validate(model: type[ModelT], tree: Mapping[str, Any]) -> ModelT:
    """`model` built from `tree`, or a ConfigError of one line for the first thing that is wrong."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe(error, model)) from None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for a pydantic report. Unknown keys come first: they are often why another one is missing."""
    found = error.errors(include_url=False)
    first = next((entry for entry in found if entry["type"] == "extra_forbidden"), found[0])
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(path, known_keys(model, first["loc"][:-1]), places(model, path.rpartition(".")[2]))
    if first["type"] == "missing":
        return f"missing setting {path}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"]) if "ctx" in first else first["msg"].removeprefix("Value error, ")
        return f"{path}: {message}" if path and path not in message else message
    message = first["msg"].removeprefix("Input ").replace("a valid tuple", "a list, as in [1, 2]")
    return f"{path}={_short(first['input'])}: the value {message}"


def unknown_key(path: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """The line for a key that does not exist: where one of its name is, the nearest valid name, or all of them."""
    *parents, name = path.split(".")
    section = ".".join(parents)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if 0 < len(elsewhere) <= MOST_PLACES:
        hint, section = f"did you mean {' or '.join(elsewhere)}?", elsewhere[0].rpartition(".")[0]
    elif nearest:
        hint = f"did you mean {'.'.join([*parents, nearest[0]])}?"
    else:
        hint = f"{f'{section} has' if parents else 'the settings are'} {', '.join(known) or 'no settings'}:"
    return f"unknown setting {path}; {hint} `{' '.join(filter(None, ['longstride settings', section]))}` explains them"


def places(model: type[BaseModel], name: str) -> list[str]:
    """Dotted paths of all settings of this name below `model`."""
    found: list[str] = []
    for key, field in model.model_fields.items():
        if key == name:
            found.append(key)
        elif (section := section_of(field.annotation)) is not None:
            found += [f"{key}.{place}" for place in places(section, name)]
    return found


def known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the settings of the section at `location` below `model`."""
    section: type[BaseModel] | None = model
    for part in location:
        if section is None:
            return []
        field = section.model_fields.get(str(part))
        # Parts that are no field (an index, the name of a union's member) stay within the section.
        if field is not None:
            section = section_of(field.annotation)
    return list(section.model_fields) if section is not None else []


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The class of a section, from the annotation of the field that holds it; None of a single setting."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, tuple, typing.Annotated):
        return next((found for part in typing.get_args(annotation) if (found := section_of(part))), None)
    return None


def _put(tree: Tree, keys: Sequence[str], value: Any, override: str, expand: Expand) -> None:
    for depth, key in enumerate(keys[:-1]):
        path = ".".join(keys[: depth + 1])
        child = tree.get(key)
        if not isinstance(child, dict):
            child = {} if child is None else expand(path, child)
            if child is None:
                raise ConfigError(f"override {override!r}: {path} is a value, not a section")
            tree[key] = child
        tree = child
    tree[keys[-1]] = value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _UniqueKeyLoader(yaml.SafeLoader):
    """The safe loader, but a key given twice is an error instead of the last one winning."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> Tree:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    loader.flatten_mapping(node)
    return {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
