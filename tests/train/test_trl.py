"""The SFTTrainer of TRL trains with a reweighter as it does without, or as plain PyTorch does with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.utils.data

from assay.methods import GraNd
from assay.tasks import CausalLM
from assay.train import Reweighter
from assay.train.huggingface import ReweightMixin
from tests.small_models import byte_tokenizer
from tests.train.test_huggingface import (
    close,
    language_model,
    losses_logged,
    mimic,
    replayed,
    replayed_tokens,
    weights_of,
)

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("CI", "1")


def trainer_of(
    folder: Path,
    reweighter: Reweighter | None = None,
    model: Any = None,
    reference: Any = None,
    keep_tokens: float | None = None,
    **options: Any,
) -> Any:
    lines = [line for line in Path(__file__).read_text().splitlines() if line.strip()][:12]
    data = datasets.Dataset.from_list([{"id": f"line-{i}", "text": line[:48]} for i, line in enumerate(lines)])
    own = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    more = {} if reweighter is None else {"reweighter": reweighter, "id_column": "id"}
    if reweighter is not None:
        more |= {"reference": reference, "keep_tokens": keep_tokens}
    kind = trl.SFTTrainer if reweighter is None else type("MyTrainer", (ReweightMixin, trl.SFTTrainer), {})
    args = trl.SFTConfig(str(folder), **(own | options))
    return kind(model, args, train_dataset=data, processing_class=byte_tokenizer(pad_token="<eos>"), **more)


@pytest.mark.parametrize("layers", ["model.layers.*", None])
def test_observing_trains_as_without(layers, tmp_path) -> None:
    """With the output layer fused, and scored: then it is not."""
    stock = trainer_of(tmp_path, model=language_model())
    stock.train()
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, layers), mode="observe")
    trainer = trainer_of(tmp_path, reweighter, model)
    trainer.train()
    assert losses_logged(trainer) == pytest.approx(losses_logged(stock), rel=1e-5)
    close(weights_of(model), weights_of(stock.model))
    ours, theirs = ([row for row in t.state.log_history if "loss" in row][-1] for t in (trainer, stock))
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert set(reweighter.table()["id"].to_pylist()) <= {f"line-{i}" for i in range(12)}


def test_reweighting_is_that_of_plain_pytorch(tmp_path) -> None:
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "*self_attn*"), temperature=0.03)
    trainer = trainer_of(tmp_path, reweighter, model)
    trainer.train()
    table = reweighter.table()
    assert max(table["weight"].to_pylist()) > 1.1
    close(weights_of(model), replayed(language_model(), table, trainer.train_dataset, 2))


@pytest.mark.parametrize("layers", ["model.layers.*", "lm_head"])
def test_chosen_tokens_are_those_of_plain_pytorch(layers, tmp_path) -> None:
    model, reference = language_model(), language_model(1)
    reweighter = Reweighter(model, GraNd(model, CausalLM(), layers), mode="observe")
    trainer = trainer_of(tmp_path, reweighter, model, reference, keep_tokens=0.3)
    trainer.train()
    data = trainer.train_dataset
    close(weights_of(model), replayed_tokens(language_model(), reference, reweighter.table(), data, 2, 0.3))


@pytest.mark.parametrize("layers", ["model.layers.*", "lm_head"])
def test_a_reference_s_losses_are_its_own(layers, tmp_path) -> None:
    """With the output layer fused, and scored: the reference's never is."""
    model, reference = language_model(), language_model(1)
    reweighter = Reweighter(model, mimic(language_model, model, layers), mode="observe", by="rho")
    trainer = trainer_of(tmp_path, reweighter, model, reference, max_steps=1)
    trainer.train()
    rows = {row["id"]: torch.tensor([row["input_ids"]]) for row in trainer.train_dataset}
    for row in reweighter.table().to_pylist():
        with torch.no_grad():
            own = float(reference(input_ids=rows[row["id"]], labels=rows[row["id"]]).loss)
        assert (row["reference_loss"], row["rho"]) == pytest.approx((own, row["loss"] - own), rel=1e-4, abs=1e-5)


FLAT = [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 80}]


@pytest.mark.parametrize("flat", FLAT, ids=["padding-free", "packing"])
def test_rows_of_many_samples(flat, tmp_path) -> None:
    """Observed, it trains as without; reweighted, as plain PyTorch does on the samples one by one."""
    options = flat | {"pad_to_multiple_of": 8, "gradient_accumulation_steps": 1, "max_steps": 3}
    stock = trainer_of(tmp_path, model=language_model(), **options)
    stock.train()
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model), mode="observe")
    trainer = trainer_of(tmp_path, reweighter, model, **options)
    trainer.train()
    assert losses_logged(trainer) == pytest.approx(losses_logged(stock), rel=1e-5)
    close(weights_of(model), weights_of(stock.model))
    samples = trainer_of(tmp_path, model=language_model()).train_dataset
    assert set(reweighter.table()["id"].to_pylist()) <= set(samples["id"])
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "*self_attn*"), temperature=0.03)
    trainer_of(tmp_path, reweighter, model, **options).train()
    table = reweighter.table()
    assert max(table["weight"].to_pylist()) > 1.1
    close(weights_of(model), replayed(language_model(), table, samples, 1))


def test_packed_rows_are_compared_with_a_reference_by_token(tmp_path) -> None:
    model, reference = language_model(), language_model(1)
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), mode="observe", by="rho")
    options = FLAT[1] | {"gradient_accumulation_steps": 1}
    trainer_of(tmp_path, reweighter, model, reference, keep_tokens=0.3, **options).train()
    samples = trainer_of(tmp_path, model=language_model()).train_dataset
    close(weights_of(model), replayed_tokens(language_model(), reference, reweighter.table(), samples, 1, 0.3))


def test_what_is_packed_has_ids(tmp_path) -> None:
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), mode="observe")
    trainer = trainer_of(tmp_path, reweighter, model, **FLAT[1])
    for row in trainer.train_dataset:
        assert len(row["id"]) == len(row["input_ids"]) == sum(row["seq_lengths"])
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(  # an override that leaves the ids behind
        [{name: row[name] for name in ("input_ids", "labels", "seq_lengths")} for row in trainer.train_dataset],
        collate_fn=trainer.data_collator,
    )
    trainer.id_column = None
    with pytest.raises(ValueError, match="came without what tells its samples apart"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy='wrapped' cuts samples in pieces"),
        ({"packing": True, "packing_strategy": "bfd_split"}, "packing_strategy='bfd_split' cuts samples in pieces"),
        ({"packing": True, "max_length": None}, "packing=True without max_length"),
        ({"loss_type": "dft"}, "loss_type='dft'"),
    ],
)
def test_what_loses_samples_is_refused(options, message, tmp_path) -> None:
    model = language_model()
    reweighter = Reweighter(model, mimic(language_model, model, "lm_head"), mode="observe")
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, reweighter, model, **options)
