"""What the worked pages speak of, tiny: data and models under the names that they have there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.small_models import TEXTS, byte_tokenizer, llama_config, save_model
from tests.small_scores import make_scores

CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\n' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}a:{% endif %}"


def pretraining_text(root: Path) -> None:
    (root / "corpus").mkdir()
    for shard, texts in (("a", TEXTS[:5]), ("b", TEXTS[5:])):
        pq.write_table(pa.table({"text": texts}), root / f"corpus/{shard}.parquet")
    save_model(root / "run/step-1000")
    save_model(root / "run/step-4000", seed=1)


score_with_ray = pretraining_text


def ask_the_scores(root: Path) -> None:
    pytest.importorskip("duckdb")
    pytest.importorskip("matplotlib")
    loss, rho = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)
    shards = {"a": {"loss": loss, "rho": rho}, "b": {"loss": rho, "rho": loss}}
    (root / "data").mkdir()
    for name in shards:
        columns = {"id": [f"{name}-{i}" for i in range(20)], "source": ["wiki", "web", None, "books"] * 5}
        pq.write_table(pa.table(columns), root / f"data/{name}.parquet")
    (root / "labels.csv").write_text("id,label\n" + "".join(f"a-{i},{int(rho[i] > 0)}\n" for i in range(12)))
    make_scores(root, shards)
    make_scores(root, {name: {"loss": scores["rho"]} for name, scores in shards.items()}, name="scores-later")


def instruction_data(root: Path) -> None:
    turns = [[{"role": "user", "content": "Gold?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    for name, rows in (("instructions", turns), ("my-task", turns[:3])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    save_model(root / "models/chat", tokenizer=byte_tokenizer(chat_template=CHAT))


def own_model(root: Path) -> None:
    rng = np.random.default_rng(0)
    signals = rng.normal(size=(40, 32)).astype(np.float32)
    columns = {"id": [f"s{i}" for i in range(40)], "signal": signals.tolist(), "label": rng.integers(0, 3, 40)}
    pq.write_table(pa.table(columns), root / "signals.parquet")


def wrong_labels(root: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    from tests.small_architectures import save

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / f"photos/{name}").mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            image.fromarray(pixels).save(root / f"photos/{name}/{i}.png")
    save(root / "models/vit", "vit", "AutoModelForImageClassification", id2label={0: "cat", 1: "dog"})
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (root / "models/vit/preprocessor_config.json").write_text(json.dumps(settings))


def forgotten_samples(root: Path) -> None:
    """It takes scikit-learn's digits."""


def chosen_tokens(root: Path) -> None:
    train_with_transformers(root)


def train_by_score(root: Path) -> None:
    """It takes scikit-learn's digits."""


def learn_from_small_models(root: Path) -> None:
    (root / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    save_model(root / "models/large")
    save_model(root / "models/small-a", seed=1, config=llama_config(hidden_size=16))
    save_model(root / "models/small-b", seed=2, config=llama_config(hidden_size=8, num_hidden_layers=1))


def other_data(root: Path) -> None:
    """It takes scikit-learn's digits and diabetes, and makes a log of students up."""


def train_with_accelerate(root: Path) -> None:
    """It takes scikit-learn's digits."""
    pytest.importorskip("accelerate")


def train_with_transformers(root: Path) -> None:
    lines = [json.dumps({"id": f"note-{i}", "text": text}) for i, text in enumerate(TEXTS)]
    (root / "notes.jsonl").write_text("\n".join(lines))
    save_model(root / "models/base")
    save_model(root / "models/better", seed=1)


def synthetic_data(root: Path) -> None:
    rows = [{"prompt": text[:6], "completion": text[6:] + "."} for text in (*TEXTS, *(text[::-1] for text in TEXTS))]
    for name, those in (("real", rows), ("prompts", rows[:6])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))
    save_model(root / "models/small")
    save_model(root / "models/small-tuned", seed=1)


def two_stage(root: Path) -> None:
    (root / "corpus").mkdir()
    (root / "held-out").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), root / "corpus/a.parquet")
    pq.write_table(pa.table({"text": [text[::-1] for text in TEXTS[:4]]}), root / "held-out/test.parquet")
    for seed, name in enumerate(("small", "small-tuned", "large")):
        save_model(root / f"models/{name}", seed=seed)


def prove_a_score(root: Path) -> None:
    """Half of the labels are wrong, and the model that scores learned from right ones: its loss finds them."""
    from tests.two_stage.noisy_labels import make_noisy_labels

    make_noisy_labels(root, 240)
    (root / "data").rename(root / "corpus")
    (root / "models/large.safetensors").rename(root / "models/fresh.safetensors")


def train_with_llama_factory(root: Path) -> None:
    """Its script is run in tests/train/test_other_trainers.py."""


def train_with_axolotl(root: Path) -> None:
    """So is this."""


def score_on_a_cluster(root: Path) -> None:
    """Two shards, so that each of two parts has one."""
    from tests.small_project import make_project

    make_project(root)
