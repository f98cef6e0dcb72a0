"""What every setting is called, may be, is by default and means, as the classes that hold them say themselves."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from .configuration import section_of

_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_PLAIN = {int: "int", float: "float", str: "text", bool: "true | false", type(None): "null"}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted name, its type and its default as YAML writes them, and a line of what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def settings_of(model: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting below `model`: its own, then those of its sections.

    A section for which a name may stand has a line of its own.
    """
    explained = explanations(model)
    sections = {name: section_of(field.annotation) for name, field in model.model_fields.items()}
    for name, section in sections.items():
        if section is None:
            field = model.model_fields[name]
            yield Setting(f"{prefix}{name}", kind(field), _default(field), explained.get(name, ""))
    for name, section in sections.items():
        if section is not None:
            field = model.model_fields[name]
            if any(isinstance(each, BeforeValidator) for each in field.metadata):
                yield Setting(f"{prefix}{name}", "name | section", _default(field), explained.get(name, ""))
            yield from settings_of(section, f"{prefix}{name}.")


def section_at(model: type[BaseModel], path: str) -> type[BaseModel] | None:
    """The section of this dotted name below `model`; None: there is none."""
    section: type[BaseModel] | None = model
    for part in path.split("."):
        field = section.model_fields.get(part) if section else None
        section = section_of(field.annotation) if field else None
    return section


def summary(model: type[BaseModel]) -> str:
    """The first paragraph of a section's documentation, on one line."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())


def explanations(model: type[BaseModel]) -> Mapping[str, str]:
    """What each field means: its `description`, or its line in the `Attributes:` of its class or of a parent's."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        found |= _attributes(each.__dict__.get("__doc__") or "")
    fields = {name: field.description or found.get(name, "") for name, field in model.model_fields.items()}
    return {name: meaning for name, meaning in fields.items() if meaning}


def kind(field: FieldInfo) -> str:
    """A field's type, for people: "int | null, >= 1"."""
    bounds = [(sign, getattr(each, name, None)) for each in field.metadata for name, sign in _SIGNS.items()]
    return ", ".join([_type(field.annotation), *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)])


def _attributes(documentation: str) -> dict[str, str]:
    """name: meaning of the `Attributes:` section, each on one line, without a full stop."""
    _, _, section = inspect.cleandoc(documentation).partition("Attributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "-"
    return (
        yaml.safe_dump(field.get_default(call_default_factory=True, validated_data={}), default_flow_style=True)
        .removesuffix("...\n")
        .rstrip()
    )


def _type(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(str(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(each) for each in arguments)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is tuple:
        return f"[{', '.join('...' if each is Ellipsis else _type(each) for each in arguments)}]"
    if origin is dict:
        return f"{{{': '.join(_type(each) for each in arguments)}}}"
    return _PLAIN[annotation]
