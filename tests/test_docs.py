"""The documentation's code runs, block after block, as it stands there: the README's Python, the worked pages' all."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from assay.cli import main
from tests import pages

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs/pages").glob("*.md"))


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_worked_pages_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that begin with a file's name are that file; commands are assay's, in a folder of tiny data."""
    getattr(pages, page.stem.replace("-", "_"))(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line) for kind, block in blocks if kind == "sh" for line in block.splitlines()]
    runs = sum(_arguments(command) is not None for command in commands)
    assert runs >= 2 or any(kind == "python" for kind, _ in blocks)
    namespace: dict[str, object] = {}
    before = set(sys.modules)
    for kind, block in blocks:
        if named := re.match(r"# ([\w.-]+\.\w+)\n", block):
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
        elif kind == "python":
            exec(compile(block, page.name, "exec"), namespace)
        elif kind == "sh":
            for arguments in filter(None, map(_arguments, map(shlex.split, block.splitlines()))):
                assert main(arguments) == 0, arguments
    for name in {path.stem for path in tmp_path.glob("*.py")} - before:
        sys.modules.pop(name, None)


def _arguments(command: list[str]) -> list[str] | None:
    """Of a command of assay, what follows its name; None of pip's."""
    for start in (["assay"], ["python", "-m", "assay"]):
        if command[: len(start)] == start:
            return command[len(start) :]
    assert command[:2] == ["pip", "install"], f"{command} is not run by any test"
    return None


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
