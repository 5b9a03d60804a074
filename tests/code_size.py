# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
Size of the package by directory: `python tests/code_size.py [PACKAGE]`.

Docstrings, comments and blank lines are not counted as code; continuation lines are. For each directory, it prints
the number of files, of lines of code, and of files that exactly one other file of the package imports. Then it prints
the longest functions.
"""

import ast
import io
import sys
import tokenize
from collections import Counter, defaultdict
from pathlib import Path


PACKAGE = Path(__file__).parents[1] / "medst_trl"
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_of_code(source: str) -> set[int]:
    """Return the numbers of the lines that contain code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str], package: Path = PACKAGE) -> set[str]:
    """Return the modules of the package that a file imports anywhere, including imports for type checking."""
    name = module_name(path, package)
    own_package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in modules}
        elif isinstance(node, ast.ImportFrom):
            start = own_package[: len(own_package) - node.level + 1] if node.level else []
            source = ".".join([*start, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                found |= {target} if target in modules else {source} & modules
    return found - {name}


def main(package: Path) -> None:
    files = sorted(package.rglob("*.py"))
    modules = {module_name(path, package): path for path in files}
    importers = Counter(found for path in files for found in imported_modules(path, set(modules), package))
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    functions = []
    for name, path in modules.items():
        source = path.read_text(encoding="utf-8")
        code = lines_of_code(source)
        parts = path.relative_to(package).parts
        row = rows[parts[0] + "/" if len(parts) > 1 else "(top level)"]
        row[0] += 1
        row[1] += len(code)
        row[2] += importers[name] == 1
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append((len(code & set(range(node.lineno, node.end_lineno + 1))), f"{name}.{node.name}"))
    print(f"{'':20}{'files':>8}{'code':>8}{'one importer':>14}")
    for directory, row in sorted(rows.items()):
        print(f"{directory:20}{row[0]:>8}{row[1]:>8}{row[2]:>14}")
    print(f"{'total':20}" + "".join(f"{sum(column):>{w}}" for column, w in zip(zip(*rows.values()), (8, 8, 14))))
    print("\nlongest functions")
    for size, name in sorted(functions, reverse=True)[:10]:
        print(f"{size:>6}  {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE)
