"""Which part of the package may import which: read from the source of every file, imports in functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lora_svd

PACKAGE = "lora_svd"
ROOT = Path(__file__).parents[1]
# A part is a folder or a file of the package. What each must not import, and why.
ABOVE = ("tuner", "compact", "streaming", "analysis", "cli")
MATHEMATICS = (
    "linalg",
    "neurons",
    "groups",
    "allocation",
    "importance",
    "schedule",
    "decompositions",
    "statistics",
    "inputs",
    "compression",
)
FORBIDDEN = {
    **dict.fromkeys(MATHEMATICS, (ABOVE, "it is mathematics of tensors and numbers")),
    "compact": (("tuner", "streaming", "analysis", "cli"), "a shipped model needs nothing of the training"),
    "streaming": (("tuner", "analysis", "cli"), "it compresses without training"),
    "tuner": (("streaming", "analysis", "cli"), "it is what PEFT calls"),
    "analysis": (("streaming", "cli"), "it is used without the command line"),
}
ALONE = f"{PACKAGE}.compact.layers"


def sources(folder: Path) -> dict[str, str]:
    """The source of every file by module name."""
    files = (folder / PACKAGE).rglob("*.py")
    return {_module(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in files}


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


parsed = cache(ast.parse)


def imported(module: str, source: str, modules: Mapping[str, str]) -> Iterator[str]:
    """The modules of the package that one imports, wherever the statement stands."""
    is_package = any(name.startswith(f"{module}.") for name in modules)
    for node in ast.walk(parsed(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            target = ".".join([*parents, *([node.module] if node.module else [])])
            if target.split(".")[0] == PACKAGE:
                for name in node.names:
                    yield inner if (inner := f"{target}.{name.name}") in modules else target


def violations(modules: Mapping[str, str]) -> list[str]:
    """What breaks the rules, one line each."""
    edges = {(module, target) for module, source in modules.items() for target in imported(module, source, modules)}
    found = []
    graph: dict[str, set[str]] = {}
    for module, target in sorted(edges):
        part, other = _part(module), _part(target)
        if part != other:
            graph.setdefault(part, set()).add(other)
        forbidden, reason = FORBIDDEN.get(part, ((), ""))
        if other in forbidden:
            found.append(f"{module} imports {target}, but {part} must not import {other}: {reason}")
        elif other == "cli" != part:
            found.append(f"{module} imports {target}, but nothing imports the command line")
        if module == ALONE:
            found.append(f"{module} imports {target}, but the file is saved with models and stands alone")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"parts import each other: {' -> '.join(reversed(error.args[1]))}")
    return found


def _part(module: str) -> str:
    return module.split(".")[1] if "." in module else PACKAGE


def test_every_file_keeps_the_rules() -> None:
    modules = sources(ROOT)
    assert len(modules) > 50
    assert ALONE in modules
    assert {_part(module) for module in modules} >= FORBIDDEN.keys() | set(ABOVE)
    assert violations(modules) == []


@pytest.mark.parametrize(
    ("module", "statement", "says"),
    [
        ("compact.size", "from ..tuner.model import LoraSVDModel", "compact must not import tuner"),
        ("compact.size", "from .. import tuner", "compact must not import tuner"),
        ("streaming.observe", "def f():\n    import lora_svd.tuner.layer", "streaming must not import tuner"),
        ("statistics", "from ..tuner import observer", "statistics must not import tuner"),
        ("statistics", "from lora_svd.tuner import observer", "statistics must not import tuner"),
        ("tuner.model", "if TYPE_CHECKING:\n    from ..analysis import summary", "tuner must not import analysis"),
        ("analysis.report", "from ..cli.results import RunResults", "analysis must not import cli"),
        ("evaluation", "from .cli import main", "nothing imports the command line"),
        ("linalg", "from .cli import main", "linalg must not import cli"),
        ("compact.layers", "from ..errors import LoraSVDError", "stands alone"),
        ("compact.layers", "from .convert import compact_module", "stands alone"),
        ("linalg", "from . import compression", "parts import each other: "),
        ("errors", "from .allocation import choose", "parts import each other: "),
    ],
)
def test_a_violation_is_found(module: str, statement: str, says: str) -> None:
    modules = sources(ROOT)
    name, before = f"{PACKAGE}.{module}", violations(modules)
    modules[name] += f"\n{statement}\n"
    found = set(violations(modules)) - set(before)
    assert any(says in line and (name in line or module in line.split()) for line in found), found


def test_scripts_beside_the_package_do_not_import_the_command_line() -> None:
    modules = sources(ROOT)
    for folder in ("benchmarks", "recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            targets = imported(path.stem, path.read_text(encoding="utf-8"), modules)
            assert [target for target in targets if _part(target) == "cli"] == [], path


def test_public_names_are_those_of_their_modules() -> None:
    """Said three times in ``__init__``, for users, type checkers and the interpreter."""
    tree = ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {node.module: tuple(name.name for name in node.names) for node in typed.body}  # pyright: ignore[reportAttributeAccessIssue]
    assert declared == lora_svd._MODULES
    assert sorted(name for names in declared.values() for name in names) == lora_svd.__all__
    assert set(lora_svd.__all__) <= set(dir(lora_svd))
    for name in lora_svd.__all__:
        assert getattr(lora_svd, name).__module__.startswith("lora_svd.")
    with pytest.raises(AttributeError, match="module 'lora_svd' has no attribute 'nothing'"):
        lora_svd.nothing  # noqa: B018


def test_importing_the_package_registers_and_loads_no_more() -> None:
    code = "import sys, lora_svd, peft; print('LORA_SVD' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    registered, *modules = done.stdout.split()
    assert registered == "True"
    late = {f"lora_svd.{name}" for name in ("analysis", "cli", "generation", "streaming", "tuner.callback")}
    assert late & set(modules) == set()
    assert "matplotlib" not in modules
