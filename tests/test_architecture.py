"""The house plan, kept by a test: imports run downwards only and never in a circle, packages keep their own names.

Reads source text; imports nothing of ours.
"""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which rooms a room may know, besides itself.
MAY_IMPORT = {
    "orchestrator": {"workers", "models", "data", "parallel", "kernels"},
    "workers": {"models", "data", "parallel", "kernels"},
    "models": {"parallel", "kernels"},
    "data": {"parallel", "kernels"},
    "parallel": {"kernels"},
    "kernels": set(),
}
# What only some rooms may use. `torch.distributed` covers `from torch import distributed` as well.
ONLY_IN = {
    "ray": {"orchestrator"},
    "mlflow": {"workers", "orchestrator"},
    "torch.distributed": {"orchestrator", "workers", "models", "parallel"},
    "torch.optim": {"orchestrator", "workers"},
    "fsspec": {"orchestrator", "workers", "data"},
}
# Mixers name what crosses a boundary; `parallel` moves it.
NOT_IN_PACKAGE = {"torch.distributed": "longstride.models.mixers"}


def imported_names(source: str, package: str) -> set[str]:
    """Absolute dotted names of everything imported, also inside functions; `package` holds the module.

    A room is named `longstride.<room>`; both `from ..parallel import mesh` and `import longstride.parallel` count.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            names.update([base, *(f"{base}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and _is_import_call(node):
            names.update(str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))
    return names


def violations(source: str, package: str) -> list[str]:
    """What the module imports although its room may not."""
    room = package.split(".")[1]
    wrong: list[str] = []
    for name in sorted(imported_names(source, package)):
        parts = name.split(".")
        if parts[0] == "longstride":
            other = parts[1] if len(parts) > 1 else ""
            if other in MAY_IMPORT and other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{room} imports {name}, upwards")
        elif parts[0] in MAY_IMPORT:
            wrong.append(f"{room} imports {name} by its bare name")
        for library, rooms in ONLY_IN.items():
            if (name == library or name.startswith(f"{library}.")) and room not in rooms:
                wrong.append(f"{room} imports {name}, which only {', '.join(sorted(rooms))} may")
        for library, closed in NOT_IN_PACKAGE.items():
            if (name == library or name.startswith(f"{library}.")) and f"{package}.".startswith(f"{closed}."):
                wrong.append(f"{package} imports {name}")
    return wrong


def modules() -> list[tuple[str, Path]]:
    """(package, file) of every module of every room."""
    files = [file for room in MAY_IMPORT for file in sorted((ROOT / room).rglob("*.py"))]
    return [("longstride." + ".".join(file.parent.relative_to(ROOT).parts), file) for file in files]


def circle(sources: dict[str, str]) -> list[str]:
    """Modules of which each imports the next and the last is the first; empty if there are none.

    `sources`: dotted module names, a package's ending in `.__init__`, and their text. Imports inside functions count.
    """
    known = {name.removesuffix(".__init__") for name in sources}
    graph: dict[str, set[str]] = {}
    for name, source in sources.items():
        names = imported_names(source, name.rpartition(".")[0])
        # "from . import module" names the package too, of which it takes nothing
        taken = {one for one in names if not any(other.startswith(f"{one}.") for other in names)}
        module = name.removesuffix(".__init__")
        graph[module] = {one if one in known else one.rpartition(".")[0] for one in taken} & known - {module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _is_import_call(node: ast.Call) -> bool:
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def test_imports_run_downwards() -> None:
    found = {
        str(file.relative_to(ROOT)): wrong
        for package, file in modules()
        if (wrong := violations(file.read_text(encoding="utf-8"), package))
    }
    assert not found


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from ..workers import Experiment", "longstride.models"),
        ("from ...data.corpus import Corpus", "longstride.models.mixers"),
        ("from .. import orchestrator", "longstride.workers"),
        ("def f():\n    import longstride.models.presets", "longstride.parallel"),
        ("import importlib\nimportlib.import_module('longstride.workers')", "longstride.data"),
        ("import ray", "longstride.workers"),
        ("def f():\n    from ray.util import placement_group", "longstride.workers"),
        ("from torch import distributed as dist", "longstride.data"),
        ("import torch.distributed.tensor", "longstride.kernels"),
        ("from torch.optim import AdamW", "longstride.models"),
        ("import models", "longstride.workers"),
        ("from torch.distributed.tensor import DTensor", "longstride.models.mixers"),
    ],
)
def test_upward_import_is_noticed(source: str, package: str) -> None:
    assert violations(source, package)


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("from ..parallel.prefix import prefix_state", "longstride.models"),
        ("from ...kernels import selective_scan", "longstride.models.mixers"),
        ("from .mixers import mamba", "longstride.models"),
        ("import ray", "longstride.orchestrator"),
        ("from torch import distributed", "longstride.parallel"),
        ("from torch.distributed.tensor import DTensor", "longstride.models"),
    ],
)
def test_downward_import_is_allowed(source: str, package: str) -> None:
    assert not violations(source, package)


def test_no_imports_run_in_a_circle() -> None:
    assert not circle({f"{package}.{file.stem}": file.read_text(encoding="utf-8") for package, file in modules()})


def test_circle_is_noticed() -> None:
    above, below = "longstride.data.corpus", "longstride.data.tasks"
    late = {above: "def f():\n    from .tasks import TASKS", below: "from .corpus import Corpus"}
    assert set(circle(late)) == {above, below}
    through_package = {"longstride.data.__init__": "from .tasks import TASKS", below: "from . import TASKS"}
    assert circle(through_package)
    assert not circle(
        {"longstride.data.__init__": "from .tasks import TASKS", below: "from . import corpus", above: ""}
    )


def test_packages_in_pyproject_match_the_folders() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {package for package, file in modules() if file.name == "__init__.py"}
    assert set(setuptools["packages"]) == on_disk
    assert set(setuptools["package-dir"]) == {f"longstride.{room}" for room in MAY_IMPORT}
    without_init = {str(file.parent) for _, file in modules() if not (file.parent / "__init__.py").exists()}
    assert not without_init


def test_constraints_pin_every_direct_dependency() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    assert "torch" not in pinned, "torch's builds differ by machine; the Makefile chooses"
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        if requirement.name != "torch":
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), text
