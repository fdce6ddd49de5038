"""What scoring takes for granted of a model of whole texts, tried out on a few random tokens when it is loaded.

What it makes of a text must follow from that text: neither padding nor a neighbour in the batch changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.tasks.base import call, logits_of, to_device

Row = tuple[int, int, Sequence[int]]
Sampler = Callable[[Iterable[Row]], dict[str, Tensor]]
"""Rows (draw, number of tokens, tokens at the beginning) -> a batch as in scoring."""

_SHORT, _LONG = 8, 16
_TOLERANCE = 1e-4  # of the largest output: rounding is below 1e-5, what is looked for above 1e-3
_MULTIPLY_ADDS = 2e10


def check_text_model(key: str, model: nn.Module, sample: Sampler, max_length: int, end: int | None) -> bool:
    """Run ``model`` (called ``key`` in errors) on random texts; whether it looks for the token ``end`` in each.

    Raises:
        EngineError: it cannot be run on token ids, or a text's outputs depend on its neighbours in the batch, up to
            ``max_length`` tokens.
    """
    trial = _Trial(key, model, sample)
    long = min(_LONG, max_length)
    with quietly():
        if not trial.same([(1, max(1, long // 2), ()), (2, long, ())]):
            raise EngineError(
                f"{key}: a text in a batch with a longer one gets other outputs than alone, so that its scores would "
                "depend on the batch (it sees padding, or finds a text's last token by a pad_token_id that is not the "
                "other models'; score those in a recipe of their own)"
            )
        parameters = sum(p.numel() for p in model.parameters())
        if (
            max_length > long
            and max_length * parameters <= _MULTIPLY_ADDS
            and not trial.same([(1, long, ()), (3, max_length, ())])
        ):
            raise EngineError(
                f"{key}: a text gets other outputs beside one of {max_length} tokens than alone; set "
                "task.max_length to less"
            )
        return end is not None and long >= 4 and not trial.same([(1, long, ()), (2, long, (end,))], refuse=False)


class _Trial:
    def __init__(self, key: str, model: nn.Module, sample: Sampler) -> None:
        self._key, self._model, self._sample = key, model, sample
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def same(self, rows: Sequence[Row], refuse: bool = True) -> bool:
        """Whether each row has the same outputs in a batch with the others as alone.

        With ``refuse`` a batch that cannot be run is an EngineError; else it is a no.
        """
        try:
            alone = [self._outputs([row])[0] for row in rows]
            together = self._outputs(rows)
        except EngineError:
            if refuse:
                raise
            return False
        return not any(_differ(a, b) for a, b in zip(alone, together, strict=True))

    def _outputs(self, rows: Sequence[Row]) -> list[Tensor]:
        batch = self._sample(rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        training = self._model.training
        what = f"{self._key}: cannot be run on texts of {max(lengths)} tokens; its config may be at fault"
        try:
            with torch.no_grad(), refusing(what):
                outputs = logits_of(call(self._model.eval(), to_device(batch, self._device)))
        finally:
            self._model.train(training)
        if outputs.ndim < 2 or len(outputs) != len(rows):
            outputs = outputs.reshape(len(rows), -1)
        # (B, T, C): only the rows that are a sample's own
        return [own[:length] if outputs.ndim == 3 else own for own, length in zip(outputs, lengths, strict=True)]


def _differ(one: Tensor, other: Tensor) -> bool:
    finite = one.isfinite()
    if one.shape != other.shape or not torch.equal(finite, other.isfinite()):
        return True
    one, other = one[finite].double(), other[finite].double()
    return bool(((one - other).abs() > _TOLERANCE * one.abs().max()).any()) if len(one) else False
