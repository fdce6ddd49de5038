"""How far a recipe walks through the code: ``python -m benchmarks.house [folder of assay]``.

The walk is read off the syntax: from the functions that `assay score` calls, every call of a function, class or method
of assay in the order in which it is written, each entered once. A stay is an uninterrupted time in one file; a return
is a stay in a file that the walk has been in before. Floors are files of the rooms that run recipes, each above all
those of them that it imports. Methods are found by their name where only one class has it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import assay
from benchmarks import options

STARTS = ("load_recipe", "run", "curate")
# Rooms below these are tools: a recipe's walk through them is theirs.
RUNNING = ("recipe", "engine", "curate")

Trees = Mapping[str, ast.Module]
Place = tuple[str, ast.AST]


def sources(root: Path) -> dict[str, str]:
    """By path within the package, but for the kernels."""
    files = (path for path in sorted(root.rglob("*.py")) if "kernels" not in path.parts)
    return {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}


def walked(file: str) -> bool:
    return file.startswith(RUNNING)


def definitions(trees: Trees) -> dict[str, list[Place]]:
    """By name: the functions, classes and methods of the rooms that are walked."""
    found: dict[str, list[Place]] = defaultdict(list)
    for file, tree in trees.items():
        for node in ast.walk(tree) if walked(file) else ():
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name].append((file, node))
    return found


def calls(node: ast.AST) -> Iterator[str]:
    """The names that are called in a definition, as they are written."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not isinstance(node, ast.ClassDef):
            continue
        yield from calls(child)
        if isinstance(child, ast.Call):
            yield child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")


def constructor(node: ast.AST) -> ast.AST | None:
    """What runs when a class is called."""
    if not isinstance(node, ast.ClassDef):
        return node
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)


def walk(defined: Mapping[str, list[Place]]) -> list[str]:
    """The files in the order in which the walk is in them."""
    stays: list[str] = []
    seen: set[int] = set()

    def enter(name: str, here: str | None) -> None:
        places = defined.get(name, [])
        places = [place for place in places if place[0] == here] or places
        if len(places) != 1 or id(places[0][1]) in seen:
            return
        file, node = places[0]
        seen.add(id(node))
        if not stays or stays[-1] != file:
            stays.append(file)
        body = constructor(node)
        for called in calls(body) if body is not None else ():
            enter(called, file)
            if stays[-1] != file:
                stays.append(file)

    for start in STARTS:
        for file in (
            "recipe/recipe.py",
            "engine/recipe.py",
            "engine/local.py",
            "curate/curation.py",
            "engine/curation.py",
        ):
            if any(place[0] == file for place in defined.get(start, [])):
                enter(start, file)
    return stays


def imports(trees: Trees, file: str, rooms: tuple[str, ...]) -> set[str]:
    """The files of these rooms that a file imports from when it is imported."""
    modules = {node.module for node in trees[file].body if isinstance(node, ast.ImportFrom) and node.module}
    paths = {f"{module.removeprefix('assay.').replace('.', '/')}.py" for module in modules}
    return {path for path in paths if path in trees and path.startswith(rooms)}


def floors(trees: Trees, rooms: tuple[str, ...]) -> Callable[[str], int]:
    """What gives the floor of a file of these rooms."""

    @cache
    def floor(file: str) -> int:
        return 1 + max(map(floor, imports(trees, file, rooms)), default=0)

    return floor


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(assay.__file__).parent, help="of assay")
    texts = sources(parser.parse_args().folder)
    trees = {file: ast.parse(text) for file, text in texts.items()}
    stays = walk(definitions(trees))
    print(f"stays {len(stays)}, files {len(set(stays))}, returns {len(stays) - len(set(stays))}")
    lines = {file: len(text.splitlines()) for file, text in texts.items()}
    for rooms in (("engine/",), tuple(f"{room}/" for room in RUNNING)):
        files = [file for file in trees if file.startswith(rooms) and not file.endswith("__init__.py")]
        highest = max(map(floors(trees, rooms), files))
        total = sum(lines[file] for file in files)
        print(f"{', '.join(room[:-1] for room in rooms)}: {len(files)} files on {highest} floors, {total} lines")
    print(f"assay: {len(lines)} files, {sum(lines.values())} lines")


if __name__ == "__main__":
    main()
