"""The hooks of the pages on LLaMA-Factory and Axolotl, in stand-ins with the constructors that their trainers have."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from tests.small_models import TEXTS, byte_tokenizer, save_model

pytestmark = pytest.mark.usefixtures("quick_collections")
PAGES = Path(__file__).parents[2] / "docs/pages"
STAND_INS = {
    # LLaMA-Factory 0.9.5
    "llamafactory/train/sft/workflow.py": """
from transformers import Seq2SeqTrainer
class CustomSeq2SeqTrainer(Seq2SeqTrainer):
    def __init__(self, finetuning_args, processor, model_args=None, gen_kwargs=None, ref_model=None, **kwargs):
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(**kwargs)
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)
""",
    # Axolotl 0.19.0
    "axolotl/core/trainers/__init__.py": """
from transformers import Trainer
class AxolotlTrainer(Trainer):
    def __init__(self, *_args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        self.eval_data_collator = eval_data_collator
        super().__init__(*_args, **kwargs)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for path, text in STAND_INS.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (tmp_path / "llamafactory/train/tuner.py").write_text("def run_exp():\n    raise AssertionError\n")
    save_model(tmp_path / "models/base")
    save_model(tmp_path / "models/better", seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def script(page: str) -> str:
    (block,) = re.findall(r"```python\n# [\w.]+\n(.*?)```", (PAGES / page).read_text(), re.DOTALL)
    return block


def arguments() -> dict:
    tokenizer = byte_tokenizer(pad_token="<eos>")
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokenizer(text[:24])["input_ids"] for text in TEXTS)]
    return {
        "model": transformers.AutoModelForCausalLM.from_pretrained("models/base", dtype=torch.float32),
        "args": transformers.Seq2SeqTrainingArguments(
            "out",
            per_device_train_batch_size=2,
            max_steps=2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        "train_dataset": datasets.Dataset.from_list(rows),
        "data_collator": transformers.DataCollatorForTokenClassification(tokenizer),
    }


def test_llama_factory(folder) -> None:
    found = runpy.run_path(str(_written(folder, "train-with-llama-factory.md")))
    import llamafactory.train.sft.workflow as workflow

    assert workflow.CustomSeq2SeqTrainer is found["Trainer"]
    trainer = workflow.CustomSeq2SeqTrainer(finetuning_args=None, processor=None, tokenizer=None, **arguments())
    trainer.train()
    table = pq.read_table("scores.parquet")
    assert table.num_rows == 4
    assert {"id", "step", "mimic", "loss", "weight"} == set(table.column_names)


def test_axolotl(folder) -> None:
    found = runpy.run_path(str(_written(folder, "train-with-axolotl.md")))
    own = arguments()
    trainer = found["Trainer"](eval_data_collator=own["data_collator"], dataset_tags=[], **own)
    trainer.train()
    assert trainer.reweighter.table().num_rows == 4
    own["args"].sample_packing = True
    with pytest.raises(ValueError, match="sample_packing=True: a packed row holds many samples"):
        found["Trainer"](**arguments() | {"args": own["args"]})


def _written(folder: Path, page: str) -> Path:
    path = folder / "hook.py"
    path.write_text(script(page))
    return path
