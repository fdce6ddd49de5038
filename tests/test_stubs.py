"""The native modules' stubs are what their bindings say: `make stubs` writes them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import assay

pytest.importorskip("mypy")
ROOM = Path(assay.__file__).parent


@pytest.mark.slow  # mypy's stubgen takes half a minute
@pytest.mark.parametrize("module", ["_native", "_cuda"])
def test_a_stub_is_what_its_module_says(module: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(f"assay.{module}") is None:
        pytest.skip(f"this build has no assay.{module}")
    # A process of its own: mypy's stubgen leaves the modules that it looks into changed.
    command = [str(Path(sys.executable).with_name("stubgen")), "-q", "-m", f"assay.{module}", "-o", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    made = tmp_path / "assay" / f"{module}.pyi"
    options = ["format", "-q", "--config", str(ROOM.parent.parent / "pyproject.toml")]
    subprocess.run([sys.executable, "-m", "ruff", *options, str(made)], check=True)
    assert made.read_text() == (ROOM / f"{module}.pyi").read_text(), "run `make stubs`"
