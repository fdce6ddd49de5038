"""Ask-LLM's three numbers, from what a judge says. That the judge says it: ``tests/tasks/test_judge.py``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from assay.methods import AskLLM
from assay.probe import Signals
from assay.tasks import CausalLM, Judge


def test_the_three_numbers() -> None:
    p = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 1e-30, 1.0], [0.0, 0.0, 1.0], [math.nan] * 3])
    method = AskLLM(nn.Linear(1, 1), Judge(), name="judge")
    assert [column.keep for column in method.columns] == ["high", "high", "none"]
    got = method.score({"judge": Signals(torch.zeros(5), p.log())})
    expected = {
        "judge": [0.2, 1, 0, 0, math.nan],
        "judge_of_both": [0.4, 1, 0, math.nan, math.nan],  # who never answers prefers neither
        "judge_answered": [0.5, 1, 1e-30, 0, math.nan],
    }
    assert list(got) == [column.name for column in method.columns] == list(expected)
    for name, values in expected.items():
        torch.testing.assert_close(got[name], torch.tensor(values), equal_nan=True)


def test_it_asks_judges_alone() -> None:
    with pytest.raises(
        ValueError, match=r"the task is CausalLM; expected tasks\.Judge \(in a recipe, task\.kind: judge"
    ):
        AskLLM(nn.Linear(1, 1), CausalLM())  # type: ignore[arg-type]
