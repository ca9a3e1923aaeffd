"""Which module may import which: arrows point downwards, from the command line to `telling`, and never in a circle.

Read from the source, so an import inside a function counts like any other; what only type checkers read
(`if TYPE_CHECKING:`) is no import. A name that a package's `__init__` exports stands for the module that defines it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import fp8_convert

PACKAGE = Path(fp8_convert.__file__).parent
# Each may import those before it, and modules of its own floor.
FLOORS = ("telling", "format", "snapshot", "targets", "plan", "stream", "output", "checks", "doors", "jobs", "cli")
# Modules at the converter's root.
DOORS = ("conversion", "verification", "inspection", "dequantization", "importing", "pushing", "finished", "tiny")

Imports = Mapping[str, Mapping[str, int]]
"""{module: {imported module: line}}, by dotted names below fp8_convert."""


def floor(module: str) -> str | None:
    """The floor of a module of the converter, None for a module that has no place yet."""
    names = module.split(".")[1:]
    if len(names) == 1 and names[0] in DOORS:
        return "doors"
    return names[0] if names and names[0] in FLOORS else None


class Source:
    """The modules below a folder and the imports between them."""

    def __init__(self, package: Path) -> None:
        files = [file for half in ("converter", "loader") for file in sorted((package / half).rglob("*.py"))]
        self._trees = {_module(file.relative_to(package)): ast.parse(file.read_text()) for file in files}
        self._packages = {_module(f.relative_to(package)) for f in files if f.name == "__init__.py"}
        self.modules = list(self._trees)
        self.imports: Imports = {module: dict(self._imports(module)) for module in self._trees}

    def _imports(self, module: str) -> Iterator[tuple[str, int]]:
        for node in _running(self._trees[module]):
            for name in self._named(module, node):
                if (target := self._defining(name)) and target != module:
                    yield target, node.lineno

    def _named(self, module: str, node: ast.stmt) -> Iterator[str]:
        """What an import statement names, such as "converter.plan.plan.Plan"."""
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("fp8_convert.") for a in node.names if a.name.startswith("fp8_convert."))
        if not isinstance(node, ast.ImportFrom):
            return
        start = (node.module or "").split(".")
        if node.level:
            above = node.level - (module in self._packages)
            start = module.split(".")[: len(module.split(".")) - above] + [part for part in start if part]
        elif start[0] == "fp8_convert":
            start = start[1:]
        else:
            return
        yield from (".".join([*start, alias.name]) for alias in node.names)

    def _defining(self, name: str) -> str | None:
        """The module that `name` is or is defined in, None for one that is not of this package."""
        if name in self._trees:
            return name
        module, _, exported = name.rpartition(".")
        if module in self._packages:
            for node in ast.walk(self._trees[module]):  # exported lazily, so declared for type checkers only
                if isinstance(node, ast.ImportFrom) and exported in [a.asname or a.name for a in node.names]:
                    return next(filter(None, map(self._defining, self._named(module, node))), None)
        return module if module in self._trees else None


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _running(tree: ast.AST) -> Iterator[ast.stmt]:
    """The import statements of a module that run, wherever they stand."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from _running(node)


def upward(imports: Imports) -> list[str]:
    """A sentence for each import of a module on a higher floor."""
    found = []
    for module, targets in imports.items():
        for target, line in targets.items():
            if not (module.startswith("converter.") and target.startswith("converter.")):
                continue
            low, high = floor(module), floor(target)
            if low and high and FLOORS.index(low) < FLOORS.index(high):
                found.append(f"{module}:{line} imports {target}: {low} stands below {high}")
    return found


def circle(imports: Imports) -> list[str]:
    """The modules of one circle, the first of them again at its end; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in imports.get(module, ()):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in imports)), [])


@pytest.fixture(scope="module")
def source() -> Source:
    return Source(PACKAGE)


def test_every_module_has_a_floor(source: Source) -> None:
    homeless = [m for m in source.modules if m.startswith("converter.") and floor(m) is None]
    assert homeless == [], "give each a wing, or name it in DOORS"


def test_no_wing_imports_a_higher_one(source: Source) -> None:
    assert upward(source.imports) == []


def test_no_circle(source: Source) -> None:
    assert " -> ".join(circle(source.imports)) == ""


def test_only_commands_that_run_pipelines_import_the_loader(source: Source) -> None:
    others = {m: targets for m, targets in source.imports.items() if not m.startswith("loader")}
    found = {module for module, targets in others.items() if any(t.startswith("loader") for t in targets)}
    assert found == {"converter.cli.demo", "converter.cli.quality"}


def test_the_loader_imports_nothing_of_the_command_line(source: Source) -> None:
    found = [
        f"{module}:{line} imports {target}"
        for module, targets in source.imports.items()
        for target, line in targets.items()
        if module.startswith("loader") and floor(target) == "cli"
    ]
    assert found == []


def test_contributing_says_the_same_order() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    order = text.partition("`telling < ")[2].partition("`")[0].replace("conversion, verification, inspection", "doors")
    assert ("telling", *order.split(" < ")) == FLOORS


# The reader of imports itself: were it blind, everything above would pass.


def package(folder: Path, files: Mapping[str, str]) -> Source:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Source(folder)


@pytest.mark.parametrize(
    "text",
    [
        "from ..plan.plan import Plan",
        "from ..plan import plan",
        "from ..plan import plan as other",
        "from fp8_convert.converter.plan.plan import Plan",
        "import fp8_convert.converter.plan.plan",
        "from .. import Plan",
        "def late() -> None:\n    from ..plan.plan import Plan",
        "class Holder:\n    try:\n        from ..plan.plan import Plan\n    except ImportError:\n        pass",
    ],
)
def test_every_form_of_an_upward_import_is_found(tmp_path: Path, text: str) -> None:
    exports = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .plan.plan import Plan\n"
    files = {"converter/__init__.py": exports, "converter/plan/__init__.py": "", "converter/plan/plan.py": "Plan = int"}
    found = package(tmp_path, files | {"converter/format/__init__.py": "", "converter/format/header.py": text})
    line = 1 + text[: text.index("import ") if text.startswith("import") else text.index("from ")].count("\n")
    assert upward(found.imports) == [
        f"converter.format.header:{line} imports converter.plan.plan: format stands below plan"
    ]


def test_what_only_type_checkers_read_does_not_count(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..plan.plan import Plan\n"
    files = {"converter/plan/plan.py": "Plan = int", "converter/format/header.py": text}
    assert package(tmp_path, files).imports["converter.format.header"] == {}


def test_a_circle_through_a_function_is_found(tmp_path: Path) -> None:
    files = {
        "loader/__init__.py": "",
        "loader/a.py": "from .b import one",
        "loader/b.py": "from . import c",
        "loader/c.py": "def late() -> None:\n    from .a import two",
    }
    assert circle(package(tmp_path, files).imports) == ["loader.a", "loader.b", "loader.c", "loader.a"]
