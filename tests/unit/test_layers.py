"""The architecture as a table: who may import whom. Read from the source, so nothing is imported to check it."""
import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "frpo"
FILES = sorted(SOURCE.rglob("*.py"))


def table_of_rooms() -> list[list[str]]:
    """The rows of the table in docs/architecture.md, top to bottom: the rooms of each, left to right."""
    text = (SOURCE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("## Rooms\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.split("\n") if line.startswith("| `")]
    return [re.findall(r"`(\w+)`", row) for row in rows]


ENGINES = {"deepspeed": {"learner"}, "ray": {"cluster"}, "vllm": {"rollout", "weight_sync"}}
"""The only areas that know an engine."""

PURE = {"types", "errors", "held", "storage", "loading", "imports", "telemetry", "objectives", "rewards", "kernels",
        "config"}
"""Areas that load on any machine: no engine and no transformers."""

BY_NAME = {SOURCE / "rewards" / name for name in ("scorer.py", "scorer_model.py")}
"""Reward functions that recipes name and only a worker process loads. They may use torch and transformers."""

ORDER = [room for row in table_of_rooms() for room in row]


def area_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path, at_load_only: bool = False) -> Iterator[str]:
    """Absolute names that a file imports; types-only imports do not count."""
    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if at_load_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from visit(child)

    return visit(ast.parse(path.read_text(encoding="utf-8")))


def module_of(name: str) -> Path | None:
    """The file behind a dotted name of ours: a module, or the package that has the name in its __init__."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        stem = SOURCE.parent.joinpath(*parts[:count])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                return path
    return None


def test_every_file_has_a_place_in_the_table():
    assert {area_of(path) for path in FILES} - {"__init__"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("area", ORDER)
def test_imports_point_down(area):
    allowed = set(ORDER[ORDER.index(area):])
    wrong = [f"{path.relative_to(SOURCE)} imports {name}" for path in FILES
             if area_of(path) == area
             for name in imports(path) if name.startswith("frpo.") and name.split(".")[1] not in allowed]
    assert not wrong


def test_nothing_imports_the_files_that_are_loaded_by_name():
    assert all(path.is_file() for path in BY_NAME)
    users = {path for path in FILES for name in imports(path)
             if name.startswith("frpo.") and module_of(name) in BY_NAME}
    assert users <= BY_NAME


@pytest.mark.parametrize("package", ENGINES)
def test_an_engine_is_imported_in_its_areas_only(package):
    users = {area_of(path) for path in FILES for name in imports(path) if name.split(".")[0] == package}
    assert users <= ENGINES[package]
    assert users, f"nobody imports {package}: this test looks in the wrong place"


def test_weight_sync_imports_vllm_inside_functions_only():
    """The learner imports a sender in a process that must not load vLLM before it has set its environment."""
    for path in (SOURCE / "weight_sync").glob("*.py"):
        assert "vllm" not in {name.split(".")[0] for name in imports(path, at_load_only=True)}, path


def test_pure_areas_import_no_engine_and_no_transformers():
    for path in FILES:
        if area_of(path) in PURE and path not in BY_NAME:
            assert not {name.split(".")[0] for name in imports(path)} & {*ENGINES, "transformers"}, path


def test_no_import_circle():
    graph = {path: {found for name in imports(path, at_load_only=True) if name.split(".")[0] == "frpo"
                    and (found := module_of(name)) not in (None, path)} for path in FILES}
    assert sum(map(len, graph.values())) > len(FILES)
    TopologicalSorter(graph).prepare()  # raises CycleError naming the circle


def test_every_file_opens_with_a_docstring():
    without = [str(path.relative_to(SOURCE)) for path in FILES
               if path.stat().st_size and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None]
    assert not without
