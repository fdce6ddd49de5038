"""What every task promises."""

from __future__ import annotations

import subprocess
import sys

import torch

from assay.tasks import CausalLM, Classification, Contrastive, Regression, Task


def test_every_task_satisfies_the_protocol() -> None:
    for task in (Classification(), CausalLM(), Regression(), Contrastive()):
        assert isinstance(task, Task)


def test_nothing_here_imports_transformers() -> None:
    code = "import sys, assay.tasks, assay.probe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_batches_are_moved_and_detached() -> None:
    x = torch.zeros(2, 1, requires_grad=True)
    moved = Classification().to(({"x": x, "name": "kept"}, torch.tensor([0, 1])), torch.device("meta"))
    assert moved[0]["x"].device.type == "meta"
    assert not moved[0]["x"].requires_grad
    assert moved[0]["name"] == "kept"
