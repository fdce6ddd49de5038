"""Weights of tokens, against a loop over them, in a plain loop and in the Trainer of transformers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from assay.train import token_weights
from tests.small_models import byte_tokenizer, llama_config

pytestmark = pytest.mark.usefixtures("quick_collections")
KEEP = 0.4


def test_against_a_loop() -> None:
    torch.manual_seed(0)
    losses, theirs = torch.rand(3, 7), torch.rand(3, 7)
    theirs[0, :2] = torch.tensor([math.nan, math.inf])
    counted = torch.rand(3, 7) < 0.8
    counted[0, :2] = True
    losses[~counted] = math.nan  # nobody's business
    found = token_weights(losses.requires_grad_(), theirs, KEEP, counted)
    losses = losses.detach()
    places = [(b, t) for b, t in itertools.product(range(3), range(7)) if counted[b, t]]
    excess = {at: float(losses[at]) - float(theirs[at]) for at in places if theirs[at].isfinite()}
    count = math.ceil(KEEP * len(places))
    kept = sorted(excess, key=lambda at: -excess[at])[:count]
    expected = torch.zeros(3, 7)
    for at in kept:
        expected[at] = len(places) / count
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert float(found[counted].mean()) == pytest.approx(1)
    total = (found * losses.nan_to_num(0)).sum() / counted.sum()
    assert float(total) == pytest.approx(sum(float(losses[at]) for at in kept) / count)  # the paper's loss


def test_ties_and_shares() -> None:
    ones = torch.ones(2, 3)
    assert token_weights(ones, ones, 0.5).tolist() == [[2, 2, 2], [0, 0, 0]]
    assert token_weights(ones, ones, 1).tolist() == ones.tolist()
    assert token_weights(ones, ones, 1e-9).tolist() == [[6, 0, 0], [0, 0, 0]]
    few = token_weights(ones, torch.tensor([[math.nan, 1, 1], [math.nan] * 3]), 1)
    assert few.tolist() == [[0, 3, 3], [0, 0, 0]]  # two of the six that there should be, and the mean is 1 still


def test_what_cannot_be() -> None:
    ones = torch.ones(2, 3)
    for settings, message in (
        ({"keep": 0.0}, r"keep: expected a share in \(0, 1\], found 0"),
        ({"keep": math.nan}, r"keep: expected a share in \(0, 1\], found nan"),
        ({"reference_losses": ones[0]}, r"losses \(2, 3\), reference_losses \(3,\)"),
        ({"counted": ones}, "counted of torch.float32; expected bool"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(**{"losses": ones, "reference_losses": ones, "keep": 0.5, **settings})
    with pytest.raises(RuntimeError, match="1 of the batch's 6 counted losses are not finite"):
        token_weights(torch.tensor([[1.0, math.inf, 1], [1, 1, 1]]), ones, 0.5)
    with pytest.raises(RuntimeError, match="none of the batch's 6 counted tokens has a finite reference loss"):
        token_weights(ones, ones * math.nan, 0.5)
    with pytest.raises(RuntimeError, match="none of the batch's 0 counted tokens"):
        token_weights(ones, ones, 0.5, torch.zeros(2, 3, dtype=torch.bool))


# ---- in a loop


def models_of(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model and a reference, whose losses differ by token."""
    torch.manual_seed(0)
    made = make(), make().eval()
    with torch.no_grad():
        for p in itertools.chain.from_iterable(model.parameters() for model in made):
            p.add_(torch.randn_like(p), alpha=0.3)
    return made


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 257, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 256, "eos_token_id": 256}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none))


@pytest.fixture(scope="module")
def texts() -> list[dict[str, Any]]:
    """Of different lengths; the first has a prompt that is not learned."""
    tokenizer = byte_tokenizer()
    rows = [tokenizer(text)["input_ids"] for text in ("to assay is to find out", "how much", "gold is in", "the ore")]
    ignored = [9, 0, 0, 0]
    return [{"input_ids": ids, "labels": [-100] * n + ids[n:]} for ids, n in zip(rows, ignored, strict=True)]


def token_losses(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's loss where it is predicted, (B, T), and which are."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = model(**inputs).logits.float()
    return F.cross_entropy(logits.mT, targets, reduction="none"), targets != -100


def by_hand(model: nn.Module, reference: nn.Module, batches: list[list[dict[str, Any]]]) -> Tensor:
    """A step's loss token by token: of each batch the mean of the losses with the highest excess, by its tokens."""
    totals, tokens = [], 0
    for batch in batches:
        found = []
        for row in batch:
            ids = torch.tensor(row["input_ids"])[None]
            logs = [net(ids).logits[0].log_softmax(-1) for net in (model, reference)]
            for t, label in enumerate(row["labels"][1:]):
                if label != -100:
                    mine, theirs = (-log[t, label] for log in logs)
                    found.append((mine, float((mine - theirs).detach())))
        found.sort(key=lambda pair: -pair[1])
        kept = [loss for loss, _ in found[: math.ceil(KEEP * len(found))]]
        totals.append(torch.stack(kept).mean() * len(found))
        tokens += len(found)
    return torch.stack(totals).sum() / tokens


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = DataCollatorForTokenClassification(byte_tokenizer(pad_token="<eos>"))(rows)
    return dict(found)


def test_a_loop_trains_on_the_chosen_tokens(texts) -> None:
    model, reference = models_of(gpt2)
    inputs = collate(texts)
    labels = inputs.pop("labels")
    losses, counted = token_losses(model, inputs, labels)
    with torch.no_grad():
        theirs, _ = token_losses(reference, inputs, labels)
    weights = token_weights(losses, theirs, KEEP, counted)
    loss = (weights * losses).sum() / counted.sum()
    expected = by_hand(model, reference, [texts])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert abs(float((loss - losses[counted].mean()).detach())) > 0.01
    found = torch.autograd.grad(loss, list(model.parameters()))
    for gradient, wanted in zip(found, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


class SelectiveTrainer(Trainer):
    def __init__(self, *args: Any, reference: nn.Module, keep: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference, self.keep = reference, keep

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        labels = inputs.pop("labels")
        losses, counted = token_losses(model, inputs, labels)
        with torch.no_grad():
            theirs, _ = token_losses(self.reference, inputs, labels)
        weights = token_weights(losses, theirs, self.keep, counted)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes * (weights * losses).sum() / num_items_in_batch


def test_the_trainer_of_transformers_trains_on_them(texts, tmp_path) -> None:
    """Two micro-batches of different lengths to a step."""
    model, reference = models_of(lambda: AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32))
    plain = copy.deepcopy(model)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, train_sampling_strategy="sequential",
    )  # fmt: skip
    data = datasets.Dataset.from_list(texts)
    trainer = SelectiveTrainer(model, arguments, collate, data, eval_dataset=data, reference=reference, keep=KEEP)
    trainer.train()
    loss = by_hand(plain, reference, [texts[:2], texts[2:]])
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for (name, found), start in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, start - 0.5 * start.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
