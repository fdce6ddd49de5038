"""`assay init`: folders of different kinds give recipes that run; what cannot is said in one line."""

from __future__ import annotations

import io
import json
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from assay.cli import main
from tests.recipe.tasks import word_models
from tests.small_architectures import save
from tests.small_models import TEXTS, byte_tokenizer, save_model
from tests.small_project import make_project, make_rows, save_mlp

CHAT = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + '\\n' }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "llama")
    save_model(root / "better", seed=1)
    save_model(root / "chat", tokenizer=byte_tokenizer(chat_template=CHAT))
    save_mlp(root / "mlp.safetensors", 0)
    save_mlp(root / "better.safetensors", 1)
    for seed in (1, 2):
        save_mlp(root / f"seed-{seed}.safetensors", seed)
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def lines(path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def started(*options: str) -> dict:
    """The recipe that init writes, once it has scored its corpus."""
    assert main(["init", "data", *options]) == 0
    assert main(["score", "recipe.yaml", "--quiet"]) == 0
    with open("recipe.yaml", encoding="utf-8") as file:
        return yaml.safe_load(file)


def columns(path: str) -> list[str]:
    return pq.read_schema(path).names


def test_texts(folder, models, capsys):
    lines(folder / "a.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(TEXTS)])
    recipe = started("--model", str(models / "llama"))
    assert recipe["task"] == {"kind": "causal_lm", "text_column": "text", "max_length": 128}
    assert recipe["corpus"] == {"path": "data", "id_column": "id"}
    out = capsys.readouterr().out
    assert "task: causal_lm, because text is the only column of texts" in out
    assert out.endswith("assay score recipe.yaml\nassay show scores --by ensemble_nll --worst 5 --best 5\n")
    assert main(["show", "scores", "--by", "ensemble_nll"]) == 0


def test_texts_with_a_reference_and_a_target(folder, models):
    pq.write_table(pa.table({"text": TEXTS}), folder / "a.parquet")
    lines(folder.parent / "target.jsonl", [{"text": text} for text in TEXTS[:2]])
    better = ["--reference", str(models / "better"), "--target", "target.jsonl"]
    recipe = started("--model", str(models / "llama"), *better)
    assert [method["method"] for method in recipe["methods"]] == ["ensemble", "grad_mimic", "gradient_cosine"]
    assert {"mimic", "gradient_cosine", "ensemble_nll"} <= set(columns("scores/a.parquet"))


def test_numbers_with_classes(folder, models):
    pq.write_table(pa.Table.from_pylist(make_rows(20)), folder / "a.parquet")
    recipe = started("--model", str(models / "mlp.safetensors"), "--reference", str(models / "better.safetensors"))
    assert recipe["task"]["input_column"] == "pixels"
    assert "mimic" in columns("scores/a.parquet")


def test_conversations(folder, models, capsys):
    turns = [[{"role": "user", "content": "Gold?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    lines(folder / "a.jsonl", [{"messages": its, "text": "x y"} for its in turns])
    recipe = started("--model", str(models / "chat"))
    assert recipe["task"]["messages_column"] == "messages"
    assert "it could also be read so: text is the only column of texts" in capsys.readouterr().out
    out = tokens_shown(capsys)
    assert "assistant: " in out
    assert "tokens count in the loss (+)" in out
    lines(folder / "a.jsonl", [{"messages": its} for its in turns])
    assert main(["init", "data", "--model", str(models / "llama"), "--out", "other.yaml"]) == 2
    assert "has no chat_template, and messages holds turns" in capsys.readouterr().err


def tokens_shown(capsys) -> str:
    """What `assay show --tokens` prints of one sample."""
    assert main(["show", "scores", "--worst", "1", "--best", "0", "--tokens"]) == 0
    return capsys.readouterr().out


def counted(card) -> str:
    return "".join(token for token, counts in card["tokens"] if counts).replace("Ġ", " ")


def test_conversations_of_sharegpts_form(folder, models, capsys):
    turns = [[{"from": "human", "value": "Gold?"}, {"from": "gpt", "value": text}] for text in TEXTS]
    lines(folder / "a.jsonl", [{"conversations": its} for its in turns])
    recipe = started("--model", str(models / "chat"))
    assert recipe["task"]["messages_column"] == "conversations"
    assert "conversations holds turns with from and value" in capsys.readouterr().out
    out = tokens_shown(capsys)
    assert "human: Gold?" in out
    assert "tokens count in the loss (+)" in out


def test_prompts_with_completions_of_messages(folder, models, capsys):
    ask = [{"role": "user", "content": [{"type": "text", "text": "Gold?"}]}]
    rows = [{"prompt": ask, "completion": [{"role": "assistant", "content": text}]} for text in TEXTS]
    lines(folder / "a.jsonl", rows)
    recipe = started("--model", str(models / "chat"))
    assert (recipe["task"]["prompt_column"], recipe["task"]["completion_column"]) == ("prompt", "completion")
    assert "task: causal_lm, because prompt and completion hold messages" in capsys.readouterr().out
    assert main(["show", "scores", "--worst", "8", "--best", "0", "--json", "--tokens"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert len(cards) == 8
    for card in cards:
        assert counted(card).startswith(card["sample"]["completion"][0]["content"][:20])
        assert card["tokens"][-1] == ["Ċ", True]
    assert main(["init", "data", "--model", str(models / "llama"), "--out", "other.yaml"]) == 2
    assert "has no chat_template, and prompt and completion hold messages" in capsys.readouterr().err


def test_prompts_with_completions(folder, models, capsys):
    rows = [f'"Question {i}?","{text}"' for i, text in enumerate(TEXTS)]
    (folder / "a.csv").write_text("\n".join(["instruction,output", *rows]) + "\n")
    recipe = started("--model", str(models / "llama"))
    assert (recipe["task"]["prompt_column"], recipe["task"]["completion_column"]) == ("instruction", "output")
    capsys.readouterr()
    assert main(["show", "scores", "--worst", "8", "--best", "0", "--json", "--tokens"]) == 0
    for card in json.loads(capsys.readouterr().out):
        assert counted(card).startswith(card["sample"]["output"][:20])
        assert not any(counts for token, counts in card["tokens"][:9])


def test_texts_with_classes(folder, tmp_path, capsys):
    rows = [{"text": text, "label": ["dull", "fine"][i % 2]} for i, text in enumerate(word_models.TEXTS)]
    lines(folder / "a.jsonl", rows)
    word_models.save(tmp_path / "bert", "bert", id2label={0: "dull", 1: "fine"})
    recipe = started("--model", str(tmp_path / "bert"))
    assert recipe["task"] == {"kind": "classification", "text_column": "text", "label_column": "label"}
    assert "with a causal language model (…ForCausalLM, or .gguf) instead: causal_lm" in capsys.readouterr().out


def test_labels_must_be_the_models(folder, tmp_path, capsys):
    """Checked before a recipe is written: nobody could say which class is which."""
    lines(folder / "a.jsonl", [{"text": "gold", "label": "fine"}])
    word_models.save(tmp_path / "nameless", "bert")
    assert main(["init", "data", "--model", str(tmp_path / "nameless")]) == 2
    assert "does not name its classes (id2label), and label holds texts" in capsys.readouterr().err
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    (folder / "a.jsonl").unlink()
    datasets.Dataset.from_dict({"text": ["x"], "label": [0]}, features=names).to_parquet(folder / "a.parquet")
    word_models.save(tmp_path / "others", "bert", id2label={0: "dull", 1: "fine"})
    assert main(["init", "data", "--model", str(tmp_path / "others")]) == 2
    assert "its classes are dull, fine, and those of label are a, b" in capsys.readouterr().err
    word_models.save(tmp_path / "three", "bert", num_labels=3)
    assert main(["init", "data", "--model", str(tmp_path / "three")]) == 2
    assert "has 3 outputs, and label has 2 classes" in capsys.readouterr().err
    (folder / "a.parquet").unlink()
    seen_first = pa.table({"text": ["x", "y"], "label": pa.array(["fine", "dull"]).dictionary_encode()})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as file, pa.ipc.new_file(file, seen_first.schema) as writer:
        writer.write_table(seen_first)
    assert main(["init", "data", "--model", str(tmp_path / "nameless")]) == 2
    assert "does not name its classes (id2label), and label holds texts" in capsys.readouterr().err


def test_pairs_of_texts_with_classes(folder, tmp_path):
    rows = [{"premise": text, "hypothesis": "gold", "label": i % 2} for i, text in enumerate(word_models.TEXTS)]
    lines(folder / "a.jsonl", rows)
    word_models.save(tmp_path / "bert", "bert")
    recipe = started("--model", str(tmp_path / "bert"))
    assert (recipe["task"]["text_column"], recipe["task"]["text_pair_column"]) == ("premise", "hypothesis")


def test_words_with_tags(folder, tmp_path, capsys):
    tags = datasets.List(datasets.ClassLabel(names=["O", "ORE"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "ner_tags": tags})
    words = [text.split() for text in word_models.TEXTS]
    rows = {"tokens": words, "ner_tags": [[int(word == "gold") for word in its] for its in words]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    word_models.save(tmp_path / "bert", "bert", auto_class="AutoModelForTokenClassification")
    capsys.readouterr()
    recipe = started("--model", str(tmp_path / "bert"))
    assert recipe["task"] == {"kind": "token_classification", "tokens_column": "tokens", "tags_column": "ner_tags"}
    capsys.readouterr()
    assert main(["show", "scores", "--worst", "1"]) == 0
    assert "ner_tags  [O, " in capsys.readouterr().out


def test_texts_with_numbers(folder, tmp_path):
    rows = [{"text": text, "score": 0.5 * i} for i, text in enumerate(word_models.TEXTS)]
    lines(folder / "a.jsonl", rows)
    word_models.save(tmp_path / "bert", "bert", num_labels=1)
    recipe = started("--model", str(tmp_path / "bert"))
    assert recipe["task"] == {"kind": "regression", "text_column": "text", "target_column": "score"}
    assert main(["show", "scores", "--by", "ensemble_residual", "--worst", "1"]) == 0


def pictures(count: int) -> list[dict]:
    """As `datasets` saves images: files' bytes."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        file = io.BytesIO()
        image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(file, "PNG")
        found.append({"bytes": file.getvalue(), "path": None})
    return found


def picture_model(path, name: str, auto_class: str, **changes) -> str:
    save(path, name, auto_class, **changes)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(path)


def test_images_with_classes(folder, tmp_path, capsys):
    images = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": pictures(6), "label": [0, 1] * 3}
    datasets.Dataset.from_dict(rows, features=images).to_parquet(folder / "a.parquet")
    vit = picture_model(tmp_path / "vit", "vit", "AutoModelForImageClassification", id2label={0: "cat", 1: "dog"})
    recipe = started("--model", vit)
    assert (recipe["task"]["image_column"], recipe["task"]["label_column"]) == ("image", "label")
    capsys.readouterr()
    assert main(["show", "scores", "--by", "ensemble_margin", "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "image  PNG 20×18, " in out
    assert "(cat)" in out or "(dog)" in out


def test_a_folder_of_images_per_class(folder, tmp_path):
    for i, image in enumerate(pictures(6)):
        (folder / ["cat", "dog"][i % 2]).mkdir(exist_ok=True)
        (folder / ["cat", "dog"][i % 2] / f"{i}.png").write_bytes(image["bytes"])
    vit = picture_model(tmp_path / "vit", "vit", "AutoModelForImageClassification", id2label={0: "cat", 1: "dog"})
    recipe = started("--model", vit)
    assert recipe["corpus"] == {"path": "data", "id_column": "path"}
    assert recipe["task"] == {"kind": "classification", "image_column": "image", "label_column": "label"}


def test_images_with_texts(folder, tmp_path):
    pq.write_table(pa.table({"image": pictures(6), "caption": [f"w{i} w3" for i in range(6)]}), folder / "a.parquet")
    from tests.engine.test_contrastive import make_tokenizer  # which needs Pillow

    clip = picture_model(tmp_path / "clip", "clip", "AutoModel")
    make_tokenizer().save_pretrained(clip)
    recipe = started("--model", clip)
    assert recipe["task"] == {"kind": "contrastive", "image_column": "image", "text_column": "caption"}


def test_several_models_by_a_glob(folder, models):
    pq.write_table(pa.Table.from_pylist(make_rows(20)), folder / "a.parquet")
    options = ["--model", str(models / "seed-*.safetensors"), "--reference", str(models / "better.safetensors")]
    recipe = started(*options, "--target", "data")
    assert [method.get("model") for method in recipe["methods"]] == [None, "model-last", "model-last"]
    assert {"mimic", "gradient_cosine"} <= set(columns("scores/a.parquet"))
    nothing = str(models / "no-*.safetensors")
    assert main(["init", "data", "--model", nothing, "--out", "other.yaml"]) == 2


def test_another_kind_of_reference_joins_the_ensemble(folder, models, tmp_path):
    """A mimic's direction leads from one set of parameters to another of the same shapes."""
    from tests.small_models import llama_config

    save_model(tmp_path / "wide", config=llama_config(hidden_size=64))
    lines(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    recipe = started("--model", str(models / "llama"), "--reference", str(tmp_path / "wide"))
    assert recipe["methods"] == [{"method": "ensemble", "models": ["model", "reference"]}]


def test_ids_that_repeat_are_not_taken_for_ids(folder, models):
    lines(folder / "a.jsonl", [{"id": "same", "text": text} for text in TEXTS])
    assert "id_column" not in started("--model", str(models / "llama"))["corpus"]


def test_names_of_strangers_stay_what_they_are(folder, models, capsys):
    """Quotes, YAML's own signs and control characters in a column's name and a path."""
    name = "te: [xt'\"\n\x1b[2J #"
    odd = folder / "a: {b}, 'c' #d"
    odd.mkdir()
    lines(odd / "a.jsonl", [{name: text} for text in TEXTS])
    assert main(["init", str(odd), "--model", str(models / "llama")]) == 0
    text = (folder.parent / "recipe.yaml").read_text()
    assert "\x1b" not in text + capsys.readouterr().out
    assert yaml.safe_load(text)["task"]["text_column"] == name
    assert main(["score", "recipe.yaml", "--quiet"]) == 0


def test_inside_the_corpus_the_scores_go_beside_it(folder, models, monkeypatch):
    lines(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    monkeypatch.chdir(folder)
    assert main(["init", ".", "--model", str(models / "llama")]) == 0
    assert main(["score", "recipe.yaml", "--quiet"]) == 0
    assert (folder.parent / "data-scores/a.parquet").exists()


def test_below_a_glob_the_scores_go_beside_where_it_looks(folder, models, monkeypatch):
    (folder / "deep").mkdir()
    pq.write_table(pa.Table.from_pylist([{"text": text} for text in TEXTS]), folder / "deep" / "a.parquet")
    monkeypatch.chdir(folder)
    assert main(["init", "**/*.parquet", "--model", str(models / "llama")]) == 0
    assert main(["score", "recipe.yaml", "--quiet"]) == 0
    assert (folder.parent / "data-scores/deep/a.parquet").exists()


def test_a_recipe_that_cannot_be_loaded_does_not_stay(folder, models, monkeypatch):
    from assay.recipe import EngineError

    def refuse(path):
        raise EngineError("no")

    lines(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    monkeypatch.setattr("assay.recipe.load_recipe", refuse)
    assert main(["init", "data", "--model", str(models / "llama")]) == 2
    assert not os.path.exists("recipe.yaml")


def test_nothing_is_written_over(folder, models, capsys):
    lines(folder / "a.jsonl", [{"text": text} for text in TEXTS])
    (folder.parent / "recipe.yaml").write_text("mine")
    assert main(["init", "data", "--model", str(models / "llama")]) == 2
    assert capsys.readouterr().err == "assay: recipe.yaml: is there already; choose another name with --out\n"
    assert (folder.parent / "recipe.yaml").read_text() == "mine"
    os.symlink("nowhere", folder.parent / "link.yaml")
    assert main(["init", "data", "--model", str(models / "llama"), "--out", "link.yaml"]) == 2
    assert main(["init", "data", "--model", str(models / "llama"), "--out", "other.yaml"]) == 0


def test_what_does_not_fit_is_one_line(folder, models, capsys):
    lines(folder / "a.jsonl", [{"text": text, "label": 1} for text in TEXTS])
    make_project(folder.parent / "numbers")
    llama = str(models / "llama")
    for arguments, message in (
        (["data"], "for classification (text holds texts and label their classes) give a …ForSequenceClassification"),
        (["nowhere", "--model", llama], "nowhere"),
        (["data", "--model", "org/name"], "assay downloads nothing"),
        (["data", "--model", str(models / "mlp.safetensors")], "is mlp with 3 outputs, for which data has no columns"),
        (["data", "--model", llama, "--reference", str(models / "mlp.safetensors")], "both must do the same task"),
        (["data", "--model", llama, "--target", "numbers/data"], "has no column 'text'"),
    ):
        assert main(["init", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert not (folder.parent / "recipe.yaml").exists()
    lines(folder / "a.jsonl", [{"n": 1}])
    assert main(["init", "data", "--model", llama]) == 2
    assert "nothing in its columns is text, images" in capsys.readouterr().err
