"""The Trainer of transformers trains with a reweighter as it does without, or as plain PyTorch does with weights."""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from assay.methods import GradMimic, GraNd
from assay.tasks import CausalLM, Classification
from assay.train import Reweighter
from assay.train.huggingface import ReweightMixin
from tests.small_models import byte_tokenizer, llama_config

pytestmark = pytest.mark.usefixtures("quick_collections")


class MyTrainer(ReweightMixin, Trainer):
    pass


@pytest.fixture(scope="module")
def text() -> datasets.Dataset:
    """The lines of this file, of very different lengths; every third has a prompt that is not learned."""
    tokenizer = byte_tokenizer()
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:20]
    rows = []
    for i, line in enumerate(lines):
        ids = tokenizer(line[:48])["input_ids"]
        ignored = min(len(ids) - 2, 9) if i % 3 == 0 else 0
        rows.append({"id": f"line-{i}", "input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def images() -> datasets.Dataset:
    digits = load_digits()
    rows = zip(digits.images[:20].astype("float32") / 16, digits.target[:20], strict=True)
    return datasets.Dataset.from_list(
        [{"id": i, "pixel_values": x[None].tolist(), "labels": int(y)} for i, (x, y) in enumerate(rows)]
    )


class Net(nn.Module):
    """A classifier that takes no ``num_items_in_batch``: the trainer divides by the accumulation steps."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.stem(pixel_values.flatten(1)).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def language_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32)


def vit(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(
        ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, **({"num_labels": 10} | options))
    )


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net()


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    own = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 3,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(own | options))


def pad() -> Any:
    return DataCollatorForTokenClassification(byte_tokenizer(pad_token="<eos>"))


def mimic(make: Callable[..., nn.Module], model: nn.Module, layers: str | None = None) -> GradMimic:
    return GradMimic(model, make(1), CausalLM() if make is language_model else Classification(), layers=layers)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def losses_logged(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("make", [language_model, vit, net])
def test_observing_trains_as_without(make, steps, text, images, tmp_path) -> None:
    data, collator = (text, pad()) if make is language_model else (images, None)
    args = arguments(tmp_path, gradient_accumulation_steps=steps)
    stock = Trainer(make(), args, collator, data)
    stock.train()
    model = make()
    start = weights_of(model)
    reweighter = Reweighter(model, mimic(make, model), mode="observe")
    trainer = MyTrainer(model, args, collator, data, reweighter=reweighter, id_column="id")
    trainer.train()
    assert losses_logged(trainer) == pytest.approx(losses_logged(stock), rel=1e-5)
    assert max(float((p.detach() - start[name]).abs().max()) for name, p in model.named_parameters()) > 1e-3
    close(weights_of(model), weights_of(stock.model))
    table = reweighter.table()
    sizes = [3] * 6 + [2] if steps == 3 else [3] * 3  # an epoch of 20 samples ends in a window of one batch of 2
    assert table["step"].to_pylist() == [i + 1 for i, size in enumerate(sizes) for _ in range(size)]
    assert set(table["id"].to_pylist()) <= set(map(str, data["id"]))


def replayed(model: nn.Module, table: Any, data: datasets.Dataset, steps: int) -> dict[str, Tensor]:
    """Plain PyTorch on the batches and weights that the table tells of, with losses and tokens counted one by one."""
    rows = {str(row["id"]): row for row in data}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches: dict[int, list[tuple[dict[str, Any], float]]] = {}
    for row in table.to_pylist():
        batches.setdefault(row["step"], []).append((rows[row["id"]], row["weight"]))
    windows = [list(batches.values())[i : i + steps] for i in range(0, len(batches), steps)]
    for window in windows:
        optimizer.zero_grad()
        items = sum(token != -100 for batch in window for row, _ in batch for token in row["labels"][1:])
        for row, weight in (pair for batch in window for pair in batch):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
            logits = model(input_ids=ids).logits[0]
            loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
            (weight * loss / items).backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("options", [{"temperature": 0.03}, {"mode": "filter", "keep": 0.4}])
def test_reweighting_is_that_of_plain_pytorch(options, text, tmp_path) -> None:
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "*self_attn*"), **options)
    args = arguments(tmp_path, gradient_accumulation_steps=2, dataloader_num_workers=1)
    trainer = MyTrainer(model, args, pad(), text, reweighter=reweighter, id_column="id")
    trainer.train()
    table = reweighter.table()
    weights = torch.tensor(table["weight"].to_pylist())
    assert float(weights.max()) > 1.4
    assert float(weights.min()) < 0.6
    close(weights_of(model), replayed(language_model(), table, text, 2))


def replayed_tokens(model: nn.Module, reference: nn.Module, table: Any, data: Any, steps: int, keep: float) -> Any:
    """Plain PyTorch on the batches that the table tells of, with the best tokens of each sorted out one by one."""
    rows = {str(row["id"]): row for row in data}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        batches.setdefault(row["step"], []).append(rows[row["id"]])
    windows = [list(batches.values())[i : i + steps] for i in range(0, len(batches), steps)]
    for window in windows:
        optimizer.zero_grad()
        items = 0
        total = torch.zeros(())
        for batch in window:
            tokens = []
            for row in batch:
                ids = torch.tensor([row["input_ids"]])
                labels = torch.tensor(row["labels"] if "labels" in row else row["input_ids"])
                own, other = (m(input_ids=ids).logits[0, :-1] for m in (model, reference))
                for place in (labels[1:] != -100).nonzero()[:, 0].tolist():
                    pair = [F.cross_entropy(z[place], labels[place + 1]) for z in (own, other)]
                    tokens.append((float((pair[0] - pair[1]).detach()), pair[0]))
            best = sorted(tokens, key=lambda token: -token[0])[: math.ceil(keep * len(tokens) - 1e-9)]
            total = total + len(tokens) / len(best) * sum(loss for _, loss in best)
            items += len(tokens)
        (total / items).backward()
        optimizer.step()
    return weights_of(model)


def test_chosen_tokens_are_those_of_plain_pytorch(text, tmp_path) -> None:
    model, reference = language_model(), language_model(1)
    reweighter = Reweighter(model, GraNd(model, CausalLM()), mode="observe")
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = MyTrainer(model, args, pad(), text, reweighter=reweighter, reference=reference, keep_tokens=0.3)
    trainer.train()
    close(weights_of(model), replayed_tokens(language_model(), reference, reweighter.table(), text, 2, 0.3))


@pytest.mark.parametrize("steps", [1, 2])
def test_rows_without_padding(steps, text, tmp_path) -> None:
    """Observed, it trains as without; reweighted, as plain PyTorch does on the samples one by one."""
    args = arguments(tmp_path, gradient_accumulation_steps=steps, dataloader_num_workers=steps - 1)
    stock = Trainer(language_model(), args, DataCollatorWithFlattening(), text)
    stock.train()
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model), mode="observe")
    MyTrainer(model, args, DataCollatorWithFlattening(), text, reweighter=reweighter).train()
    close(weights_of(model), weights_of(stock.model))
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "*self_attn*"), temperature=0.03)
    MyTrainer(model, args, DataCollatorWithFlattening(), text, reweighter=reweighter).train()
    table = reweighter.table()
    assert max(table["weight"].to_pylist()) > 1.4
    close(weights_of(model), replayed(language_model(), table, text, steps))


def test_a_reference_s_losses_in_a_row_of_many_samples_are_its_own(text, tmp_path) -> None:
    """One whose cache is on would let them see one another."""
    model, reference = language_model(), language_model(1)
    assert reference.config.use_cache
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), by="rho", mode="observe")
    args, collator = arguments(tmp_path, max_steps=1), DataCollatorWithFlattening()
    MyTrainer(model, args, collator, text, reweighter=reweighter, reference=reference).train()
    rows = {str(row["id"]): row for row in text}
    for row in reweighter.table().to_pylist():
        sample = {name: torch.tensor([rows[row["id"]][name]]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            assert row["reference_loss"] == pytest.approx(float(reference(**sample).loss), rel=1e-4)


def test_a_reference_that_lets_samples_see_one_another_is_refused(text, tmp_path) -> None:
    torch.manual_seed(0)
    reference = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2))
    for p in reference.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), by="rho", mode="observe")
    args, collator = arguments(tmp_path, max_steps=1), DataCollatorWithFlattening()
    trainer = MyTrainer(model, args, collator, text, reweighter=reweighter, reference=reference)
    with pytest.raises(RuntimeError, match="reference: the samples of a packed row see one another"):
        trainer.train()


@pytest.mark.parametrize("make", [language_model, vit])
def test_a_reference_s_losses_are_its_own(make, text, images, tmp_path) -> None:
    data, collator = (text, pad()) if make is language_model else (images, None)
    model, reference = make(), make(1).train()
    reweighter = Reweighter(model, mimic(make, model), by="rho", temperature=0.1, every=2)
    runs = []
    reference.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled() or reference.training))
    trainer = MyTrainer(model, arguments(tmp_path), collator, data, reweighter=reweighter, reference=reference)
    trainer.train()
    assert runs == [False, False]  # of three steps, the first and the third are scored
    rows = {str(row["id"]): row for row in data}
    table = reweighter.table().to_pylist()
    for row in table:
        sample = {name: torch.tensor([value]) for name, value in rows[row["id"]].items() if name != "id"}
        own = float(reference.eval()(**sample).loss)
        assert (row["reference_loss"], row["rho"]) == pytest.approx((own, row["loss"] - own), rel=1e-4, abs=1e-5)
    rho = torch.tensor([row["rho"] for row in table]).view(2, 3)
    weights = torch.tensor([row["weight"] for row in table]).view(2, 3)
    torch.testing.assert_close(weights, 3 * (rho / 0.1).softmax(1), rtol=1e-4, atol=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(text, tmp_path) -> None:
    def run(resume: bool, **options: Any) -> tuple[dict[str, Tensor], Any]:
        model = language_model()
        reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), temperature=0.1, layers="lm_head")
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, **options)
        trainer = MyTrainer(model, args, pad(), text, reweighter=reweighter, id_column="id")
        trainer.train(resume_from_checkpoint=resume)
        return weights_of(model), reweighter.table()

    whole, table = run(False)
    state = torch.load(tmp_path / "checkpoint-2/reweighter.pt", weights_only=True)
    assert state["step"] == 2
    (tmp_path / "checkpoint-4").rename(tmp_path / "whole")
    again, resumed = run(True)
    close(again, whole)
    assert resumed.select(["id", "step"]).equals(table.select(["id", "step"]))
    assert resumed["weight"].to_pylist() == pytest.approx(table["weight"].to_pylist(), rel=1e-4)
    for file in tmp_path.glob("checkpoint-*/reweighter.pt"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no reweighter\.pt"):
        run(True)


@pytest.mark.parametrize("removed", [True, False])
def test_evaluation_is_the_trainers_own(removed, text, tmp_path) -> None:
    """While it trains too; with ids in the held-out data or without."""
    args = arguments(tmp_path, remove_unused_columns=removed, eval_strategy="steps", eval_steps=1, max_steps=2)
    stock_args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=2)
    stock = Trainer(language_model(), stock_args, pad(), text, text)
    stock.train()
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), mode="observe")
    held_out = text.remove_columns("id") if removed else text
    trainer = MyTrainer(model, args, pad(), text, held_out, reweighter=reweighter, id_column="id")
    trainer.train()
    logged = [[row["eval_loss"] for row in t.state.log_history if "eval_loss" in row] for t in (trainer, stock)]
    assert len(logged[0]) == 2
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)
    assert trainer.predict(held_out).metrics["test_loss"] == pytest.approx(logged[1][-1], rel=1e-5)
    assert len(reweighter.table()) == 6


@pytest.mark.parametrize(
    ("kind", "labels", "classes"),
    [
        ("regression", [[0.5], [1.5], [-0.5], [2.0], [0.0]], 1),
        ("multi_label_classification", [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]], 3),
    ],
)
def test_other_losses_of_classifiers(kind, labels, classes, images, tmp_path) -> None:
    data = images.select(range(len(labels))).remove_columns("labels").add_column("labels", labels)
    args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, learning_rate=0.05)
    options = {"num_labels": classes, "problem_type": kind}
    stock, model = vit(**options), vit(**options)
    Trainer(stock, args, None, data).train()
    method = GradMimic(model, vit(1, **options), Classification())
    reweighter = Reweighter(model, method, mode="observe")
    MyTrainer(model, args, None, data, reweighter=reweighter, id_column="id").train()
    close(weights_of(model), weights_of(stock))


def scaled(kind: type[Trainer]) -> type[Trainer]:
    """With a scaler that overflows in the first step, as half precision's does."""

    class Scaled(kind):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)

    return Scaled


@pytest.mark.parametrize("options", [{"mode": "observe"}, {"mode": "filter", "keep": 1.0, "layers": "stem"}])
def test_a_step_that_overflows_is_the_scalers_to_skip(options, images, tmp_path) -> None:
    args = arguments(tmp_path, max_steps=4)
    model, stock = net(), net()
    with torch.no_grad():
        for made in (model, stock):
            made.head.weight *= 1e3  # so that gradients overflow, and losses do not
    start = weights_of(model)
    scaled(Trainer)(stock, args, None, images).train()
    reweighter = Reweighter(model, mimic(net, model), **options)
    scaled(MyTrainer)(model, args, None, images, reweighter=reweighter).train()
    close(weights_of(model), weights_of(stock))
    assert not torch.equal(start["head.weight"], model.head.weight)
    table = reweighter.table()
    assert 1 not in table["step"].to_pylist()
    assert 4 in table["step"].to_pylist()
    assert set(table["weight"].to_pylist()) == {1.0}


# ---- nothing is lost without a word


class Steps(TrainerCallback):
    """How often the optimizer stepped."""

    count = 0

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.count += 1


class OwnLoss(MyTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return F.cross_entropy(model(**inputs)["logits"], inputs["labels"])


class AddedLoss(MyTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) + sum(p.square().sum() for p in model.parameters())


class TwoPasses(MyTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) + 0.0 * super().compute_loss(model, inputs)


class OwnStep(MyTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs.pop("id")
        loss = model(**inputs)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoader(MyTrainer):
    def get_train_dataloader(self):
        return Trainer.get_train_dataloader(self)


class Focal(Net):
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        output = super().forward(pixel_values, labels)
        return output | {"loss": (1 - (-output["loss"]).exp()) ** 2 * output["loss"]}


@pytest.mark.parametrize(
    ("trainer", "model", "message"),
    [
        (OwnLoss, Net, "not made of the model's own loss"),
        (AddedLoss, Net, "adds what has no samples"),
        (TwoPasses, Net, "ran forward 2 times|runs forward again"),
        (OwnStep, Net, "without the reweighter"),
        (OwnLoader, Net, "no 'id' in the batch"),
        (MyTrainer, Focal, "Focal gives the loss"),
    ],
)
def test_a_bypass_is_an_error_before_the_first_optimizer_step(trainer, model, message, images, tmp_path) -> None:
    torch.manual_seed(0)
    made, steps = model(), Steps()
    reweighter = Reweighter(made, mimic(net, made), mode="observe")
    made_trainer = trainer(
        made, arguments(tmp_path), None, images, callbacks=[steps], reweighter=reweighter, id_column="id"
    )
    with pytest.raises((RuntimeError, ValueError), match=message):
        made_trainer.train()
    assert steps.count == 0


def test_one_sample_without_anything_to_predict_is_an_error(text, tmp_path) -> None:
    model = language_model()
    data = text.map(lambda row: {"labels": [-100] * len(row["labels"])} if row["id"] == "line-3" else row)
    reweighter = Reweighter(model, mimic(language_model, model), mode="observe")
    args = arguments(tmp_path, per_device_train_batch_size=20)
    with pytest.raises(RuntimeError, match="nothing to predict"):
        MyTrainer(model, args, pad(), data, reweighter=reweighter, id_column="id").train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: the trainer replaces"),
        ({"torch_compile": True}, "torch_compile=True: the layers"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_settings_that_lose_weights_are_refused_by_name(options, message, images, tmp_path, monkeypatch) -> None:
    made = net()
    reweighter = Reweighter(made, mimic(net, made), mode="observe")
    args = arguments(tmp_path)
    for name, value in options.items():  # the trainer need not be able to do it here
        monkeypatch.setattr(args, name, value)
    if "label_smoothing_factor" in options:
        made.config = type("Config", (), {"problem_type": None})()
    with pytest.raises(ValueError, match=message):
        MyTrainer(made, args, None, images, reweighter=reweighter)


def refusal(message: str, folder: Path, data: Any, make: Callable[..., Any] = MyTrainer, **options: Any) -> None:
    made = net()
    reweighter = Reweighter(made, mimic(net, made), mode="observe")
    with pytest.raises((ValueError, TypeError), match=message):
        make(made, arguments(folder), None, data, **({"reweighter": reweighter, "id_column": "id"} | options))


def test_what_does_not_fit_is_refused(images, tmp_path, monkeypatch) -> None:
    other = net()
    refusal("no column 'name', only id, pixel_values", tmp_path, images, id_column="name")
    refusal("expected an assay.train.Reweighter", tmp_path, images, reweighter=other)
    refusal("another model than", tmp_path, images, reweighter=Reweighter(other, mimic(net, other), mode="observe"))
    refusal("compute_loss_func", tmp_path, images, compute_loss_func=lambda outputs, labels, **_: outputs["loss"])
    refusal("dispatch_batches", tmp_path, images.to_iterable_dataset().with_format("torch"))
    for flag, name in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):

        class Sharded(MyTrainer):
            def create_accelerator_and_postprocess(self, flag: str = flag) -> None:
                super().create_accelerator_and_postprocess()
                setattr(self, flag, True)

        refusal(f"{name} is on", tmp_path, images, Sharded)
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    refusal("2 GPUs in one process", tmp_path, images)


def test_a_reference_that_is_none_is_refused(images, tmp_path) -> None:
    model = net()
    args = (arguments(tmp_path), None, images)
    for keep, message in ((0.0, r"expected a share in \(0, 1\], found 0\.0"), (0.5, "pass reference=")):
        with pytest.raises(ValueError, match=message):
            MyTrainer(model, *args, reweighter=Reweighter(model, mimic(net, model)), keep_tokens=keep)
        model = net()
    with pytest.raises(ValueError, match="reference: is the model that is trained"):
        MyTrainer(model, *args, reweighter=Reweighter(model, mimic(net, model)), reference=model)
    other = net()
    plain = Reweighter(other, GraNd(other, Classification()))
    with pytest.raises(ValueError, match="reference: grand compares with no reference's losses"):
        MyTrainer(other, *args, reweighter=plain, reference=net(1))


def test_ids_that_are_none_are_refused(images, tmp_path) -> None:
    data = [{name: value for name, value in row.items() if name != "id"} for row in images]
    made = net()
    for rows, message in ((data, "has no 'id', only"), ([row | {"id": 0.5} for row in data], "expected a string or")):
        reweighter = Reweighter(made, mimic(net, made), mode="observe")
        trainer = MyTrainer(made, arguments(tmp_path), None, rows, reweighter=reweighter)
        with pytest.raises(ValueError, match=message):
            trainer.train()
        reweighter.detach()


def test_without_ids_on_purpose(images, tmp_path) -> None:
    made = net()
    reweighter = Reweighter(made, mimic(net, made), mode="observe")
    MyTrainer(made, arguments(tmp_path), None, images, reweighter=reweighter, id_column=None).train()
    assert reweighter.table()["id"].null_count == 9


def test_a_copied_model_does_not_count(images, tmp_path) -> None:
    made = net()
    reweighter = Reweighter(made, mimic(net, made), mode="observe")
    trainer = MyTrainer(made, arguments(tmp_path), None, images, reweighter=reweighter)
    trainer.model_wrapped = copy.deepcopy(made)
    with pytest.raises(RuntimeError, match="ran forward 0 times"):
        trainer.train()


# ---- several processes


def lines_of(path: Path) -> datasets.Dataset:
    tokenizer = byte_tokenizer()
    ids = [tokenizer(line[:48])["input_ids"] for line in path.read_text().splitlines() if line.strip()][:20]
    return datasets.Dataset.from_list(
        [{"id": f"line-{i}", "input_ids": x, "labels": list(x)} for i, x in enumerate(ids)]
    )


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    data, found = lines_of(Path(__file__)), {}
    args = arguments(Path(folder), gradient_accumulation_steps=2, save_strategy="steps", save_steps=1)
    gc.collect()
    gc.freeze()
    stock = Trainer(language_model(), args, pad(), data)
    stock.train()
    for name, options in (("observe", {"mode": "observe"}), ("all", {"mode": "filter", "keep": 1.0})):
        tables = []
        for resume in (None, f"{folder}/checkpoint-1"):
            model = language_model()
            reweighter = Reweighter(model, mimic(language_model, model), **options)
            trainer = MyTrainer(model, args, pad(), data, reweighter=reweighter, id_column="id")
            trainer.train(resume_from_checkpoint=resume)
            assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
            close(weights_of(model), weights_of(stock.model))
            tables.append(reweighter.table().select(["id", "step"]))
        assert tables[0].equals(tables[1])
        found[name] = tables[0]["id"].to_pylist()
    torch.save(found, Path(folder) / f"found{rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_without(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(20000 + os.getpid() % 20000))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, ids in first.items():
        assert len(ids) == 18
        for i in range(0, 18, 3):  # a micro-batch
            assert len({*ids[i : i + 3], *second[name][i : i + 3]}) == 6
