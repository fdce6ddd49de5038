"""Benchmarks' command lines: ``--help`` measures nothing, and a misspelt option is not a run without it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@cache
def runnable() -> dict[str, ast.Module]:
    """By module name: what ``python -m`` runs."""
    found = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name == "__main__.py" or 'if __name__ == "__main__":' in text:
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__main__")] = ast.parse(text)
    return found


def attributes(tree: ast.Module) -> set[str]:
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("module", runnable())
def test_options_are_argparses(module: str) -> None:
    used = attributes(runnable()[module])
    assert "sys.argv" not in used, "expected argparse, as benchmarks/options.py has it"
    assert any(name.endswith(".parse_args") for name in used) or {"options.quick", "options.some"} & used


# Many modules in one process: most of what they import is the same.
CALLS = """
import json, runpy, sys
modules, found = json.loads(sys.argv[1]), {}
for module in modules:
    for option in ("--help", "--nonsense"):
        sys.argv = [module, option]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            found[f"{module} {option}"] = end.code
print("\\n" + json.dumps(found))
"""


@pytest.mark.slow
def test_help_is_given_and_what_is_unknown_refused() -> None:
    modules = list(runnable())
    called = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(modules)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert called.returncode == 0, called.stderr
    expected = {f"{module} {option}": code for module in modules for option, code in (("--help", 0), ("--nonsense", 2))}
    assert json.loads(called.stdout.splitlines()[-1]) == expected
