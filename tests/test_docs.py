"""The documentation's code runs, block after block, as it stands there: the README's Python, the worked pages' all."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
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


def test_the_array_script_gives_every_task_its_part(tmp_path: Path) -> None:
    """Without Slurm: a shell runs it with what Slurm sets, and an `assay` that says what it was asked for."""
    text = (ROOT / "docs/pages/score-on-a-cluster.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if block.startswith("#!"))
    ((tasks, parts),) = re.findall(r"--array=1-(\d+)\n.*PARTS=(\d+)\n", script, re.DOTALL)
    assert tasks == parts
    assay = tmp_path / "assay"
    assay.write_text('#!/bin/sh\necho "$ASSAY_NUM_THREADS $*"\n', encoding="utf-8")
    assay.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for task in (1, parts):
        slurm = {
            "PATH": path,
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_ARRAY_TASK_COUNT": "1",
        }
        run = subprocess.run(["bash", "-eu", "-c", script], env=slurm, capture_output=True, text=True, check=True)
        assert run.stdout == f"8 score recipe.yaml --shard {task}/{parts} --devices cuda:0\n"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
