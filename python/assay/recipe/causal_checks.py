"""What scoring takes for granted of a causal language model, tried out on a few random tokens when it is loaded.

A sample's loss must follow from its own tokens: no position sees a later one, and neither padding nor a longer
neighbour in the batch changes it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.trials import device_of, differ, in_eval_mode, right_padded
from assay.tasks import CausalLM

_SHORT, _LONG = 8, 16
_DRAWS = 2  # a router of experts may tip over by rounding, but not twice
_MULTIPLY_ADDS, _LOGITS = 2e10, 2e7


def check_causal_lm(key: str, model: nn.Module, tokens: Sequence[int], max_length: int) -> int:
    """Run ``model`` (called ``key`` in errors) on random ``tokens``; returns the number of its classes.

    Raises:
        EngineError: it cannot be run on token ids, or a sample's logits depend on later tokens, on padding, or on how
            long its neighbours are, up to ``max_length`` tokens.
    """
    with quietly(), in_eval_mode(model):
        trial = _Trial(key, model, tokens, max_length)
        if trial.always(trial.sees_later_tokens):
            raise EngineError(
                f"{key}: a later token changes the logits before it, so that this is no causal language model (an "
                "encoder such as BERT needs is_decoder: true in its config, and to have been trained so)"
            )
        if trial.always(trial.depends_on_padding):
            raise EngineError(
                f"{key}: a text in a batch with a longer one gets other logits than alone, so that its scores would "
                "depend on the batch (the model sees padding, or counts the batch's tokens)"
            )
        if trial.always(lambda draw: trial.depends_on_length(draw, max_length)):
            raise EngineError(
                f"{key}: a text gets other logits beside one of {max_length} tokens than alone (its position encoding "
                "stretches with the batch's longest text, as longrope and dynamic do); set task.max_length to at most "
                f"{trial.longest()}"
            )
        return trial.classes


class _Trial:
    def __init__(self, key: str, model: nn.Module, tokens: Sequence[int], max_length: int) -> None:
        self._key, self._model, self._task = key, model, CausalLM(fused=False)
        self._tokens = torch.as_tensor(tokens)
        self._max_length = max_length
        self._long = min(_LONG, max_length)
        self._short = self._long // 2
        forward = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in forward
        self._alone: dict[tuple[int, int], Tensor] = {}
        self.classes = self._logits_alone(50, self._short).shape[1]

    def always(self, fails: Callable[[int], bool]) -> bool:
        return all(fails(draw) for draw in range(_DRAWS))

    def sees_later_tokens(self, draw: int) -> bool:
        other = self._draw(draw + 100, self._long)
        other[: self._short] = self._draw(draw, self._long)[: self._short]
        changed = self._logits([other])[0]
        return differ(self._logits_alone(draw, self._long)[: self._short], changed[: self._short])

    def depends_on_padding(self, draw: int) -> bool:
        rows = ((draw + 50, self._short), (draw, self._long))
        together = self._logits([self._draw(*row) for row in rows])
        alone = [self._logits_alone(*row) for row in rows]
        return any(differ(a, b) for a, b in zip(alone, together, strict=True))

    def depends_on_length(self, draw: int, length: int) -> bool:
        """Whether a short text beside one of ``length`` tokens gets other logits than alone.

        The long one need not be run where positions can be given: its last tokens stand for it.
        """
        short, tail = self._draw(draw + 50, self._short), self._draw(draw + 100, self._short)
        if self._takes_positions:
            near = torch.arange(self._short)
            alone = self._logits([short], near[None])[0]  # given positions may mean others than the model's own
            if differ(alone, self._logits([short, tail], torch.stack([near, near + length - self._short]))[0]):
                return True
        parameters = sum(p.numel() for p in self._model.parameters())
        affordable = int(min(_MULTIPLY_ADDS / max(parameters, 1), _LOGITS / self.classes))
        if length > affordable:
            return False
        together = self._logits([short, self._draw(draw + 100, length)])
        return differ(self._logits_alone(draw + 50, self._short), together[0])

    def longest(self) -> int:
        """The longest neighbour that changes nothing."""
        low, high = self._long, self._max_length
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.depends_on_length(0, middle) else (middle, high)
        return low

    def _draw(self, draw: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(draw)
        return self._tokens[torch.randint(len(self._tokens), (length,), generator=generator)]

    def _logits_alone(self, draw: int, length: int) -> Tensor:
        if (draw, length) not in self._alone:
            self._alone[draw, length] = self._logits([self._draw(draw, length)])[0]
        return self._alone[draw, length]

    def _logits(self, rows: Sequence[Tensor], positions: Tensor | None = None) -> list[Tensor]:
        """One (T, C) per row; shorter rows are padded as in scoring."""
        batch = right_padded(rows)
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        if positions is not None:
            batch["position_ids"] = positions
        device = device_of(self._model)
        with torch.no_grad(), refusing(f"{self._key}: cannot be run on token ids; its config may be at fault"):
            logits = self._task.forward(self._model, self._task.to(batch, device)).logits
        assert logits is not None
        return [own[: len(row)] for own, row in zip(logits.view(len(rows), -1, logits.shape[1]), rows, strict=True)]
