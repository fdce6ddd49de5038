"""Reweighting in a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from assay._lazy import require
from assay.train.reweighter import Reweighter

_lightning: Any = require("lightning.pytorch", "lightning")
_strategies: Any = require("lightning.pytorch.strategies", "lightning")

_GIVEN = ("logits", "labels", "reference_losses")
Ids = str | Callable[[Any], Sequence[Any] | Tensor] | None


class ReweightCallback(_lightning.Callback):  # type: ignore[misc]
    """Trains on what a method says is worth it, in a Lightning ``Trainer``::

        reweighter = assay.train.Reweighter(module.net, method, layers="head")
        trainer = lightning.pytorch.Trainer(callbacks=[ReweightCallback(reweighter, ids="id")])

    ``training_step`` returns one loss per sample (``reduction="none"``) in place of their mean, alone or as ``"loss"``
    of its dict; ``self.manual_backward`` takes them likewise. While it fits, the callback stands in for the module's
    ``backward``, which is where Lightning hands the losses over, divided by ``accumulate_grad_batches`` and multiplied
    by the loss scale of 16-bit precision: both stay in the gradients and out of the scores.

    The reweighter's steps are calls of backward, one per batch, not per step of the optimizer. Its state and table are
    in Lightning's checkpoints. What a method asks for beside the losses, ``"logits"``, ``"labels"`` and
    ``"reference_losses"``, is taken from the dict that ``training_step`` returns. With manual optimization, call
    ``reweighter.backward`` yourself where it is wanted; the callback then checks and saves alone.

    Args:
        reweighter: of the module's network. Its model is a part of the LightningModule; on a single device it may be
            the module itself.
        ids: of the batch's samples: the batch's entry of this name, or what a function makes of the batch. None: the
            table's rows have no ids.

    Raises:
        ValueError: when fitting begins: a strategy other than a single device or DDP, a module with a ``backward`` of
            its own, a reweighter of another model.
        RuntimeError: before the optimizer steps, if the backward pass went past the reweighter; a batch without ids.
    """

    def __init__(self, reweighter: Reweighter, ids: Ids = None) -> None:
        if not isinstance(reweighter, Reweighter):
            raise TypeError(f"reweighter: expected an assay.train.Reweighter, found {type(reweighter).__name__}")
        self.reweighter, self.ids = reweighter, ids
        self._batch_ids: Sequence[Any] | Tensor | None = None
        self._given: dict[str, Tensor] = {}
        self._at_backward = self._at_batch = reweighter.step

    # ---- Lightning's hooks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _check_strategy(trainer)
        _check_module(trainer, pl_module, self.reweighter)
        self._at_backward = self.reweighter.step
        pl_module.backward = lambda loss, *args, **kwargs: self._backward(trainer, pl_module, loss, args, kwargs)
        step = pl_module.training_step
        pl_module.training_step = lambda *args, **kwargs: self._returned(step(*args, **kwargs))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch_ids = None if self.ids is None else _ids_of(batch, self.ids)
        self._at_batch = self.reweighter.step

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._check_consumed(self._at_backward)
        self._at_backward = self.reweighter.step

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not pl_module.automatic_optimization:  # otherwise on_after_backward has looked, or the step was skipped
            self._check_consumed(self._at_batch)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        _give_back(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        _give_back(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self.reweighter.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.reweighter.load_state_dict(state_dict)

    # ---- a step

    def _returned(self, output: Any) -> Any:
        """Of the training step: what a method may ask for beside the losses."""
        there = output if isinstance(output, Mapping) else {}
        self._given = {name: there[name].detach() for name in _GIVEN if isinstance(there.get(name), Tensor)}
        return output

    def _backward(self, trainer: Any, pl_module: Any, loss: Tensor, args: Any, kwargs: Any) -> None:
        """In place of ``loss.backward()``."""
        if args or kwargs:
            raise RuntimeError("manual_backward: expected the losses alone where a Reweighter is at work")
        scale = 1 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale *= scaler.get_scale()
        given, self._given = self._given, {}
        self.reweighter.backward(loss / scale, self._batch_ids, scale=scale, **given)

    def _check_consumed(self, since: int) -> None:
        if self.reweighter.step == since:
            raise RuntimeError(
                "the backward pass went past the Reweighter, so that the step would train unweighted: expected "
                "training_step to return its losses, or self.manual_backward(losses) in place of "
                "losses.mean().backward()"
            )


def _give_back(module: Any) -> None:
    """What stood in for the module's own."""
    for name in ("backward", "training_step"):
        module.__dict__.pop(name, None)


def _check_strategy(trainer: Any) -> None:
    allowed = (_strategies.SingleDeviceStrategy, _strategies.DDPStrategy)
    if not isinstance(trainer.strategy, allowed):
        raise ValueError(
            f"Trainer(strategy={type(trainer.strategy).__name__}): it shards the model or runs backward itself, where "
            "samples' gradients cannot be seen; expected a single device, or strategy='ddp'"
        )


def _check_module(trainer: Any, module: Any, reweighter: Reweighter) -> None:
    name = type(module).__name__
    if type(module).backward is not _lightning.LightningModule.backward:
        raise ValueError(f"{name}.backward is its own, and the callback would replace it; remove it")
    if "backward" in vars(module) or "training_step" in vars(module):
        raise ValueError(f"{name}: its backward or training_step has been replaced; expected one ReweightCallback")
    if not any(part is reweighter.model for part in module.modules()):
        raise ValueError(
            f"the Reweighter's model, a {type(reweighter.model).__name__}, is no part of {name}; make it of the same "
            "object, as Reweighter(module.net, ...)"
        )
    if reweighter.model is module and isinstance(trainer.strategy, _strategies.DDPStrategy):
        raise ValueError(
            f"the Reweighter's model is the {name} itself, which DDP calls for its training_step too; give it the "
            "network inside, as Reweighter(module.net, ...)"
        )


def _ids_of(batch: Any, ids: str | Callable[[Any], Sequence[Any] | Tensor]) -> Sequence[Any] | Tensor:
    if callable(ids):
        return ids(batch)
    try:
        found: Sequence[Any] | Tensor = batch[ids]
    except (KeyError, TypeError, IndexError) as error:
        there = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise RuntimeError(
            f"ids={ids!r}: the batch has no such entry, it has {there}; have the loader's collate_fn keep it, or "
            "give a function of the batch"
        ) from error
    return found
