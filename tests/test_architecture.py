# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""Imports follow the rings of docs/architecture.md, including imports inside functions and for type checking."""

import ast
from graphlib import CycleError, TopologicalSorter

import pytest
from code_size import PACKAGE, imported_modules, lines_of_code, module_name


RINGS = {
    "base": ("base",),
    "method": ("data", "policy", "training", "engines", "selftrain", "evaluation"),
    "pipeline": ("pipeline", "hub", "report", "cli", "__main__"),
    "extras": ("demo", "interop"),
}
RING_OF = {name: ring for ring, names in RINGS.items() for name in names}
BUDGET = 15_531

FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
IMPORTS = {name: imported_modules(path, set(FILES)) - {"medst_trl"} for name, path in FILES.items()}
del IMPORTS["medst_trl"]  # it re-exports the public names of all packages


def ring(module: str) -> str:
    return RING_OF[module.split(".")[1]]


def package(module: str) -> str:
    return module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_package_belongs_to_a_ring():
    assert {name.split(".")[1] for name in IMPORTS} == set(RING_OF)


def test_no_import_points_outwards():
    order = list(RINGS)
    outwards = {
        (name, found)
        for name, imports in IMPORTS.items()
        for found in imports
        if order.index(ring(found)) > order.index(ring(name))
    }
    assert outwards == set()


def test_modules_have_no_import_cycle():
    assert find_cycle(IMPORTS) == []


def test_packages_have_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        graph.setdefault(package(name), set()).update(package(found) for found in imports)
    assert find_cycle({name: found - {name} for name, found in graph.items()}) == []


def test_the_package_stays_within_its_budget():
    assert sum(len(lines_of_code(path.read_text(encoding="utf-8"))) for path in FILES.values()) <= BUDGET


@pytest.mark.parametrize("name", sorted(IMPORTS))
def test_imports_are_relative_within_a_directory_and_absolute_between_them(name):
    own = package(name)
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"line {node.lineno}"
            if not node.level and own != "medst_trl" and node.module.startswith(f"{own}."):
                assert "." in node.module.removeprefix(f"{own}."), f"line {node.lineno}"


# Names that several stages, metrics or scripts define by convention.
CONVENTIONS = {"STAGE", "check", "logger", "main", "make_trainer", "plan", "score", "shown_texts", "summarize"}


def test_a_public_name_is_defined_once():
    modules: dict[str, list[str]] = {}
    for name, path in FILES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                defined = [node.name]
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined = [target.id for target in targets if isinstance(target, ast.Name)]
            else:
                continue
            for public in defined:
                if not public.startswith("_") and public not in CONVENTIONS:
                    modules.setdefault(public, []).append(name)
    assert {public: found for public, found in modules.items() if len(found) > 1} == {}
