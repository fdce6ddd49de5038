"""Reweighting in the Trainer of transformers and the SFTTrainer of TRL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from assay._lazy import require
from assay.probe.packing import Packing
from assay.train.collation import WithIds, WithoutIds
from assay.train.flattening import SEQ_IDX, Flattened, flattens, pack_with_ids
from assay.train.fused_head import has_tapped_head, unfused
from assay.train.model_losses import ModelLosses, reference_losses, split_loss
from assay.train.reweighter import Reweighter
from assay.train.tokens import token_weights

# Arguments of the trainer with which a loss is not the model's own, one per sample, of layers that can be seen.
_REFUSED = {
    "label_smoothing_factor": "the trainer replaces the model's loss by a smoothed one",
    "torch_compile": "the layers' inputs cannot be seen in a compiled model",
    "auto_find_batch_size": "a batch that does not fit is tried again, smaller, and its samples would count twice",
    "use_liger_kernel": "its fused loss gives no losses by sample",
    "sample_packing": "a packed row holds many samples, and their ids are lost",
    "ddp_static_graph": "the reweighted layers' gradients come outside of the static graph",
}


class ReweightMixin:
    """Trains on what a method says is worth it, in the ``Trainer`` of transformers or the ``SFTTrainer`` of TRL::

        class MyTrainer(assay.train.huggingface.ReweightMixin, transformers.Trainer):
            pass

        trainer = MyTrainer(model, args, train_dataset=data, reweighter=Reweighter(model, method), id_column="id")

    Every micro-batch's backward pass becomes ``reweighter.backward`` with one loss per sample (the mean over its
    tokens where it has several), scaled so that with equal weights the gradient is the trainer's own, whatever it does
    about accumulation, tokens and processes; what it reports as the loss stays its own number. Weights are made within
    a micro-batch, over all processes; the reweighter's ``step``, ``warmup_steps`` and ``every`` count micro-batches.
    With several processes, a sample with which Accelerate fills up an epoch's last batch is in the table again.

    The reweighter's state and table lie beside ``trainer_state.json`` in every checkpoint, and come back with it.

    The model's loss has to be cross-entropy with its ``labels``, by token or sample, or what transformers trains
    classifiers of several labels and regressions with. Any other, and whatever would lose weights or ids on the way,
    is an error before the optimizer's first step.

    Args:
        reweighter: of the trainer's model, the same object.
        id_column: of the training data, with the samples' ids, strings or integers; the model does not see it, and
            evaluation does not need it. None: the table's rows have no ids.
        reference: for a method that compares losses with a reference's (``by="rho"``): run without gradients on every
            micro-batch that is scored, in eval mode, on the device that it is on.
        keep_tokens: of a language model, train on this share of a micro-batch's tokens (of all processes), those
            whose loss most exceeds the ``reference``'s (Rho-1; see ``token_weights``). A sample's loss, which is scored
            and weighted, is then the mean of its tokens' losses times those weights.
        args, kwargs: the trainer's own.

    Raises:
        ValueError: a setting of the trainer under which weights could not be right; no such column.
    """

    args: Any
    accelerator: Any
    data_collator: Any
    model: Any
    train_dataset: Any
    add_callback: Any
    _set_signature_columns_if_needed: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        reweighter: Reweighter,
        id_column: str | None = "id",
        reference: nn.Module | None = None,
        keep_tokens: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(reweighter, Reweighter):
            raise TypeError(f"reweighter: expected an assay.train.Reweighter, found {type(reweighter).__name__}")
        above: Any = super()
        self.id_column = id_column  # by which TRL's data sets are prepared
        above.__init__(*args, **kwargs)
        self.reweighter = reweighter
        self.reference, self.keep_tokens = reference, keep_tokens
        self._seen = reweighter.step
        self._apart: set[tuple[Any, ...]] = set()
        _check_trainer(self)
        _check_model(reweighter, self.model)
        _check_reference(reweighter, self.model, reference, keep_tokens)
        _check_column(self.train_dataset, id_column)
        watch = require("transformers", "train").TrainerCallback()
        watch.on_substep_end = watch.on_pre_optimizer_step = self._check_consumed
        self.add_callback(watch)

    # ---- ids

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Of TRL's trainer: the training data are packed with their ids."""
        above: Any = super()
        packs = packing and self.id_column is not None and dataset_name == "train"
        rest = (processing_class, args, packing and not packs, formatting_func, dataset_name)
        if packs:
            _check_column(dataset, self.id_column)
        prepared = above._prepare_dataset(dataset, *rest)
        return pack_with_ids(prepared, str(self.id_column), args) if packs else prepared

    def get_train_dataloader(self) -> Any:
        above: Any = super()
        if flattens(self.data_collator):
            collator: Any = Flattened(self.data_collator, self.id_column)
        elif self.id_column is None:
            return above.get_train_dataloader()
        else:
            collator = WithIds(self.data_collator, self.id_column)
        self._set_signature_columns_if_needed()
        if self.id_column in self._signature_columns:
            raise ValueError(
                f"id_column: {self.id_column!r} is an argument of the model; expected a column beside them"
            )
        with self._collating(collator, *([] if self.id_column is None else [self.id_column])):
            return above.get_train_dataloader()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        above: Any = super()
        with self._collating(WithoutIds(self.data_collator, self.id_column)):
            return above.get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        above: Any = super()
        with self._collating(WithoutIds(self.data_collator, self.id_column)):
            return above.get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _collating(self, collator: Any, *columns: str) -> Iterator[None]:
        """Loaders that are made meanwhile keep these columns too, and collate so."""
        kept, own = self._signature_columns, self.data_collator
        self.data_collator = collator
        if columns:
            self._signature_columns = [*kept, *columns]
        try:
            yield
        finally:
            self.data_collator = own
            if columns:
                self._signature_columns = kept

    # ---- a step

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The trainer's own, but for its backward pass."""
        above: Any = super()
        ids, packing = self._ids(inputs), self._packing(inputs)
        passes: list[ModelLosses] = []
        references: list[ModelLosses] = []

        def before(_: nn.Module, called_with: Any, arguments: dict[str, Any]) -> None:
            if self.reference is not None and (self.reweighter.is_due or self.keep_tokens is not None):
                references.append(reference_losses(self.reference, called_with, arguments, packing, self._apart))

        def after(module: nn.Module, _: Any, arguments: dict[str, Any], output: Any) -> None:
            passes.append(split_loss(module, arguments, output, packing))

        def backward(loss: Tensor, **options: Any) -> None:
            self._backward(loss, passes, ids, references)

        own = self.reweighter.model
        head: AbstractContextManager[None] = nullcontext()
        if has_tapped_head(own, self.reweighter.tapped):
            head = unfused(own)
        with head, nullcontext() if packing is None else self.reweighter.packed(packing):
            hooks = (
                own.register_forward_pre_hook(before, with_kwargs=True, prepend=True),  # as the trainer calls it
                own.register_forward_hook(after, with_kwargs=True),
            )
            self.accelerator.backward = backward  # on the instance, for this micro-batch
            try:
                loss: Tensor = above.training_step(model, inputs, *args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
                del self.accelerator.backward
        return loss

    def _ids(self, inputs: Any) -> list[str] | None:
        if self.id_column is None:
            return None
        if self.id_column not in inputs:
            raise ValueError(
                f"no {self.id_column!r} in the batch, only {', '.join(map(str, inputs))}: an override of "
                "get_train_dataloader lost the ids; call super().get_train_dataloader() in it, or pass id_column=None"
            )
        ids: list[str] = inputs.pop(self.id_column)
        return ids

    def _packing(self, inputs: Any) -> Packing | None:
        if SEQ_IDX in inputs:
            return Packing.of(inputs.pop(SEQ_IDX))
        places = inputs.get("position_ids")
        restarts = isinstance(places, Tensor) and len(places) == 1 and int((places == places.flatten()[0]).sum()) > 1
        if flattens(self.data_collator) or (restarts and inputs.get("attention_mask") is None):
            raise ValueError(
                "a batch in one row came without what tells its samples apart: an override of get_train_dataloader "
                "lost it; call super().get_train_dataloader() in it"
            )
        return None

    def _backward(
        self, loss: Tensor, passes: list[ModelLosses], ids: list[str] | None, references: list[ModelLosses]
    ) -> None:
        if len(passes) != 1:
            raise RuntimeError(
                f"the model ran forward {len(passes)} times in a training step; expected once, on the batch: a "
                "compute_loss override has to leave the forward pass to the trainer's own"
            )
        own = passes[0]
        scaler = self.accelerator.scaler
        scale = len(own.losses) * own.multiplier(loss) * own.counts / self.accelerator.gradient_accumulation_steps
        if scaler is not None:
            scale = scale * scaler.scale(torch.ones((), device=loss.device))
        theirs = references[0] if references else None
        losses = own.losses if self.keep_tokens is None else _of_chosen_tokens(own, theirs, self.keep_tokens)
        others = theirs.losses if theirs is not None and self.reweighter.compares else None
        self.reweighter.backward(
            losses, ids, scale=scale, logits=own.logits, labels=own.labels, reference_losses=others
        )

    def _check_consumed(self, *args: Any, **kwargs: Any) -> None:
        """After every micro-batch, before the optimizer steps."""
        if self.reweighter.step == self._seen:
            raise RuntimeError(
                "a training step ran without the reweighter, so that no weights were used: an override of "
                "training_step has to call super().training_step(...)"
            )
        self._seen = self.reweighter.step

    # ---- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        above: Any = super()
        above.save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and output_dir is not None:  # a checkpoint, whose trainer_state.json comes later
            os.makedirs(output_dir, exist_ok=True)
            torch.save(self.reweighter.state_dict(), self._state_file(output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        above: Any = super()
        checkpoint: Any = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = require("transformers.trainer_utils", "train").get_last_checkpoint(self.args.output_dir)
        if checkpoint:
            self._resume(checkpoint)
        self._seen = self.reweighter.step
        return above.train(resume_from_checkpoint, *args, **kwargs)

    def _resume(self, checkpoint: str) -> None:
        file = self._state_file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} has no {file.name}: expected a checkpoint that a trainer with a reweighter saved, with "
                "as many processes; to start from its weights alone, load the model from it"
            )
        self.reweighter.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def _state_file(self, checkpoint: str) -> Path:
        one = self.args.world_size <= 1
        return Path(checkpoint) / ("reweighter.pt" if one else f"reweighter_{self.args.process_index}.pt")


def _check_trainer(trainer: Any) -> None:
    """ValueError of a setting that would lose weights, or make wrong ones."""
    args = trainer.args
    for name, why in _REFUSED.items():
        value = getattr(args, name, None)
        if value:
            raise ValueError(f"ReweightMixin: {name}={value}: {why}; leave it out")
    if getattr(args, "loss_type", "nll") != "nll":
        raise ValueError(f"ReweightMixin: loss_type={args.loss_type!r}: expected 'nll', a sum over tokens")
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", "bfd") != "bfd":
        raise ValueError(
            f"ReweightMixin: packing_strategy={args.packing_strategy!r} cuts samples in pieces, which would be scored "
            "by themselves or see one another; expected 'bfd', which packs whole ones"
        )
    for name in ("packing", "padding_free"):
        if getattr(args, name, False) and not flattens(trainer.data_collator):
            raise ValueError(
                f"ReweightMixin: {name}=True, and {type(trainer.data_collator).__name__} does not lay whole samples "
                "end to end in one row: what it packs cannot be told apart; expected the SFTTrainer's own collator"
            )
    for name, what in (("compute_loss_func", "a loss that is not the model's"), ("model_init", "another model")):
        if getattr(trainer, name, None) is not None:
            raise ValueError(
                f"ReweightMixin: {name}: it makes {what}, which the reweighter does not know; leave it out"
            )
    for name, is_on in (
        ("DeepSpeed", trainer.is_deepspeed_enabled),
        ("FSDP", trainer.is_fsdp_enabled or bool(getattr(args, "fsdp", None))),
        ("torch.compile (of Accelerate)", _compiles(trainer.accelerator)),
        ("parallelism_config", getattr(trainer.accelerator, "parallelism_config", None) is not None),
        ("a LOMO optimizer", "lomo" in str(args.optim).lower()),
    ):
        if is_on:
            raise ValueError(
                f"ReweightMixin: {name} is on, under which gradients by sample cannot be had; expected one process, or "
                "several under DistributedDataParallel (torchrun, accelerate launch)"
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"ReweightMixin: {args.n_gpu} GPUs in one process, which the trainer runs under DataParallel, on copies of "
            "the model that the reweighter does not see; start one process per GPU with torchrun, or set "
            "CUDA_VISIBLE_DEVICES=0"
        )
    _check_dispatch(trainer)


def _compiles(accelerator: Any) -> bool:
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    return plugin is not None and str(getattr(plugin.backend, "value", plugin.backend)).upper() != "NO"


def _check_dispatch(trainer: Any) -> None:
    """Batches that the first process hands to the others hold tensors alone."""
    dispatch = trainer.args.accelerator_config.dispatch_batches
    if dispatch is None:
        dispatch = isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)
    if dispatch and trainer.id_column is not None:
        raise ValueError(
            "ReweightMixin: dispatch_batches is on (the default with an iterable data set), and ids do not survive it; "
            'pass accelerator_config={"dispatch_batches": False} in the training arguments'
        )


def _of_chosen_tokens(own: ModelLosses, theirs: ModelLosses | None, keep: float) -> Tensor:
    """(B,): means over a sample's tokens times their weights, whose mean is 1 over the batch."""
    if own.tokens is None or theirs is None or theirs.tokens is None:
        raise RuntimeError("ReweightMixin: keep_tokens: the model's losses are not of tokens; leave it out")
    ours, other = own.tokens, theirs.tokens.as_wide_as(own.tokens)
    if not torch.equal(ours.counted, other.counted.to(ours.counted.device)):
        raise RuntimeError("ReweightMixin: keep_tokens: the reference predicts other tokens than the model does")
    weights = token_weights(ours.losses, other.losses.to(ours.losses.device), keep, ours.counted)
    return ours.means(weights)[0]


def _check_reference(reweighter: Reweighter, model: Any, reference: nn.Module | None, keep: float | None) -> None:
    if keep is not None and not 0 < keep <= 1:
        raise ValueError(f"ReweightMixin: keep_tokens: expected a share in (0, 1], found {keep}")
    if keep is not None and reference is None:
        raise ValueError("ReweightMixin: keep_tokens: tokens are compared with a reference's; pass reference=")
    if reference is not None and keep is None and not reweighter.compares:
        raise ValueError(
            f"ReweightMixin: reference: {reweighter.method.name} compares with no reference's losses; leave it out, or "
            "score with a method that does, such as GradMimic (by='rho')"
        )
    if reference is model:
        raise ValueError("ReweightMixin: reference: is the model that is trained; expected another one")


def _check_model(reweighter: Reweighter, model: Any) -> None:
    if reweighter.model is not model:
        raise ValueError(
            "ReweightMixin: the reweighter was made of another model than the trainer's; expected the same object. "
            "With PEFT, get_peft_model comes first, then the reweighter of what it gives, then the trainer of that"
        )


def _check_column(dataset: Any, column: str | None) -> None:
    names = getattr(dataset, "column_names", None)
    if column is not None and names is not None and column not in names:
        raise ValueError(
            f"id_column: the training data have no column {column!r}, only {', '.join(names)}; add it, for instance "
            f"dataset.add_column({column!r}, list(range(len(dataset)))), or pass id_column=None"
        )
