"""Imports point one way, and `import assay` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import assay

ROOT = Path(assay.__file__).parent

# room -> rooms it may import from at module level or inside functions (docs/architecture.md)
MAY_IMPORT = {
    "_lazy": set(),
    "_json": set(),
    "_native": set(),
    "_cuda": set(),
    "ops": {"_native", "_cuda", "kernels"},
    "tasks": {"ops"},
    "probe": {"_json", "ops", "tasks", "_lazy"},
    "corpus": {"_json", "_lazy", "_version", "ops"},
    "select": {"_lazy"},
    "methods": {"ops", "probe", "tasks", "_lazy"},
    "retrain": {"_json", "methods", "ops", "probe", "tasks", "_lazy"},
    "scoring": {"corpus", "methods"},
    "ray": {"engine"},
    "reading": {"curate", "_lazy"},
    "recipe": {"_json", "corpus", "methods", "ops", "tasks", "_lazy"},
    "engine": {"_json", "corpus", "methods", "ops", "probe", "recipe", "select", "tasks", "_lazy", "_version"},
    "curate": {"_json", "corpus", "select", "_lazy", "_version"},
    "report": {"_json", "corpus", "_lazy", "_version"},
    "explore": {"_json", "corpus", "curate", "report", "_lazy"},
    "train": {"corpus", "curate", "methods", "ops", "probe", "select", "tasks", "_lazy"},
    "two_stage": {"_json", "corpus", "curate", "engine", "probe", "recipe", "select", "tasks", "_version"},
    "demo": {
        "_json",
        "corpus",
        "curate",
        "engine",
        "methods",
        "ops",
        "probe",
        "recipe",
        "retrain",
        "select",
        "tasks",
        "_lazy",
    },
    "cli": {
        "_json",
        "corpus",
        "curate",
        "engine",
        "explore",
        "recipe",
        "ops",
        "demo",
        "report",
        "select",
        "two_stage",
        "__init__",
    },
    "__main__": {"cli"},
    "_version": set(),
    "__init__": {"_version", "methods", "ops", "probe", "reading", "retrain", "scoring", "select", "tasks", "train"},
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(path: Path) -> set[str]:
    """The rooms of assay that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.split(".")[0] == "assay"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "assay":
            assert node.level == 0
            if node.module == "assay":  # from assay import ops, __version__
                rooms = {alias.name for alias in node.names}
                found |= {name if name in MAY_IMPORT else "__init__" for name in rooms}
            else:
                found.add(room(node.module))
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in MAY_IMPORT, f"{here} has no place in docs/architecture.md's table"
    wrong = imports_of(path) - MAY_IMPORT[here] - {here}
    assert not wrong, f"{path.relative_to(ROOT)} imports from {sorted(wrong)}"


def test_every_folder_of_tests_is_a_package() -> None:
    """Else two files of one name are one module to pytest, and which of them runs depends on the worker."""
    tests = Path(__file__).parent
    folders = {path.parent for path in tests.rglob("*.py")}
    assert sorted(f for f in folders if not (f / "__init__.py").exists()) == []


def test_the_command_takes_installed_modules_before_those_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "yaml.py").write_text("raise SystemExit('the folder's own yaml')")
    (tmp_path / "recipe.yaml").write_text("version: 2")
    command = [sys.executable, "-m", "assay", "validate", "recipe.yaml"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert "recipe.yaml" in run.stderr, run.stderr


def test_import_is_light() -> None:
    """Only torch, numpy and pyarrow (and what they bring); everything else where it is first used."""
    code = "import sys, assay; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {
        "pydantic",
        "typer",
        "rich",
        "yaml",
        "fsspec",
        "sklearn",
        "scipy",
        "transformers",
        "datasets",
        "ray",
        "duckdb",
        "pandas",
        "matplotlib",
    }
    before = subprocess.run(
        [sys.executable, "-c", code.replace(", assay", ", torch, numpy, pyarrow")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert not (heavy & set(loaded)) - set(before)


def test_native_library_is_not_linked_to_torch_or_openmp() -> None:
    from assay import _native

    libraries = subprocess.run(["ldd", str(_native.__file__)], capture_output=True, text=True, check=False).stdout
    if not libraries:
        pytest.skip("ldd says nothing about the extension here")
    assert "torch" not in libraries
    assert "gomp" not in libraries
    assert "cuda" not in libraries


def test_command_without_its_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from assay.__main__ import main; sys.exit(main())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "assay: the command needs typer; it comes with `pip install 'assay[cli]'`\n"
