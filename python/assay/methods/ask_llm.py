"""Ask-LLM: a judge's probability that the sample is worth training on.

Sachdeva et al., *How to Train Data-Efficient LLMs* (2402.09668), section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from assay.methods.base import Column, Method, Need
from assay.probe import Signals
from assay.tasks import Judge


class AskLLM(Method):
    """How likely a judge is to answer yes.

    Columns, of p(yes) and p(no), the sums of the judge's softmax over all spellings of the two answers: ``ask_llm``
    is p(yes), the paper's score; ``ask_llm_of_both`` p(yes) / (p(yes) + p(no)); ``ask_llm_answered`` p(yes) + p(no),
    how often the judge answers the question at all. NaN where there is no question.

    Args:
        model: the judge, a causal language model or an encoder–decoder.
        task: asks it; what is asked is in the batches, which ``tasks.Prompt`` makes.
        name: the first column, and what the others begin with.

    Raises:
        ValueError: another task.
    """

    def __init__(self, model: nn.Module, task: Judge, *, name: str = "ask_llm") -> None:
        if not isinstance(task, Judge):
            raise ValueError(
                f"AskLLM: asks a judge, and the task is {type(task).__name__}; expected tasks.Judge (in a recipe, "
                "task.kind: judge)"
            )
        self.name, self._need = name, Need(model, task, logits=True)

    @property
    def columns(self) -> Sequence[Column]:
        return (
            Column(self.name, "high", "p(yes): the judge's probability that the sample is worth training on"),
            Column(f"{self.name}_of_both", "high", "p(yes) / (p(yes) + p(no))"),
            Column(f"{self.name}_answered", "none", "p(yes) + p(no): how often the judge answers at all"),
        )

    def needs(self) -> Mapping[str, Need]:
        return {"judge": self._need}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        answers = signals["judge"].logits
        assert answers is not None
        yes, no = answers.double()[:, 0], answers.double()[:, 1]
        answered = torch.logaddexp(yes, no)
        both = {"": yes.exp(), "_of_both": (yes - answered).exp(), "_answered": answered.exp()}
        return {f"{self.name}{which}": values.float() for which, values in both.items()}
