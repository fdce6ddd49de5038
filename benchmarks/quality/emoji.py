"""Do recipes find wrong labels and wrong captions among images? ``python -m benchmarks.quality.emoji [FOLDER]``.

The emoji of four vendors, as the npm packages ``emoji-datasource-*`` have them (64 × 64 pixels, a name and a category
each), are a data set of images with 20 % wrong categories, and one of images with texts with 20 % wrong names. Small
models are trained on parts of each, with the wrong ones, and a recipe scores the part that they have not seen: the
ensemble's scores and mimic, from an early checkpoint of a run to its last, beside the controls (random, the size of the
image's file, the length of its name). FOLDER may hold the packages; otherwise `npm pack` fetches them for the run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
import yaml
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from assay._json import dumps
from assay.corpus.images import ImageLimits, decode_image
from assay.engine.local import run
from assay.recipe.preprocessor import parse
from assay.recipe.recipe import load_recipe
from benchmarks import options
from benchmarks.timing import RESULTS, machine

VENDORS, VERSION = ("apple", "google", "twitter", "facebook"), "16.0.0"
WRONG = 0.2
SIDE = 32
SIZES: dict[str, Any] = {"side": SIDE, "width": 48, "parts": 2, "seeds": 2}
EPOCHS = {"classification": (2, 5), "contrastive": (3, 7)}


@dataclass(frozen=True)
class Emoji:
    """One rendering: its file, what it is, what it is said to be."""

    vendor: str
    png: bytes
    name: str
    category: str
    said_name: str
    said_category: str

    @property
    def wrong(self) -> tuple[bool, bool]:
        """Whether category and name are other than they should be."""
        return self.said_category != self.category, self.said_name != self.name


def packages(folder: Path, vendors: Sequence[str] = VENDORS) -> list[Path]:
    """The vendors' packages in the folder, fetched where they are missing.

    Raises:
        FileNotFoundError: one is missing, and npm too.
    """
    paths = [folder / f"emoji-datasource-{vendor}-{VERSION}.tgz" for vendor in vendors]
    for vendor, path in zip(vendors, paths, strict=True):
        if not path.exists():
            if shutil.which("npm") is None:
                raise FileNotFoundError(f"{path.name}: not there, and npm, which fetches it, is missing: install it")
            command = ["npm", "pack", "--silent", f"emoji-datasource-{vendor}@{VERSION}"]
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return paths


def read_package(path: Path, vendor: str) -> list[Emoji]:
    """A package's emoji without those of skin tones, read out of the archive."""
    with tarfile.open(path) as archive:
        files = {m.name: m for m in archive.getmembers() if m.isfile()}

        def content(name: str) -> bytes:
            file = archive.extractfile(files[f"package/{name}"])
            assert file is not None
            return file.read()

        found = []
        for entry in json.loads(content("emoji.json")):
            image = f"img/{vendor}/64/{entry['image']}"
            if entry["category"] != "Component" and f"package/{image}" in files:
                name = (entry["name"] or entry["short_name"].replace("_", " ")).lower()
                found.append(Emoji(vendor, content(image), name, entry["category"], name, entry["category"]))
    return found


def planted(emoji: Sequence[Emoji], share: float, seed: int) -> list[Emoji]:
    """In an order of their own; of a share of them the category, of another the name, is that of another one."""
    rng = np.random.default_rng(seed)
    mixed = [emoji[i] for i in rng.permutation(len(emoji))]
    categories = sorted({each.category for each in emoji})
    count = int(share * len(mixed))
    for i in rng.permutation(len(mixed))[:count]:
        others = [category for category in categories if category != mixed[i].category]
        mixed[i] = replace(mixed[i], said_category=str(rng.choice(others)))
    for i in rng.permutation(len(mixed))[:count]:
        name = next(n for j in rng.integers(0, len(mixed), 100) if (n := mixed[j].name) != mixed[i].name)
        mixed[i] = replace(mixed[i], said_name=name)
    return mixed


def preprocessor(side: int) -> dict[str, Any]:
    return {"image_processor_type": "ViTImageProcessor", "size": {"height": side, "width": side}}


def pixels_of(emoji: Sequence[Emoji], side: int) -> torch.Tensor:
    """(N, 3, side, side), prepared as the recipes do."""
    own, limits = parse(preprocessor(side), "benchmark"), ImageLimits()
    return own.batch([own.pixels("png", decode_image("png", e.png, limits), limits.pixels) for e in emoji])


def train(
    model: Any,
    count: int,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    epochs: Sequence[int],
    seed: int,
    to: Path,
) -> None:
    """Train with AdamW and a cosine schedule; the model is saved after each number of ``epochs``."""
    torch.manual_seed(seed)
    batch = 64
    steps = epochs[-1] * (count // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(1, epochs[-1] + 1):
        model.train()
        for rows in torch.randperm(count)[: count // batch * batch].view(-1, batch):
            optimizer.zero_grad()
            loss(model, rows).backward()
            optimizer.step()
            schedule.step()
        if epoch in epochs:
            model.eval().save_pretrained(to / f"epoch-{epoch}")


def train_classifier(pixels: torch.Tensor, labels: torch.Tensor, sizes: dict[str, Any], seed: int, to: Path) -> None:
    torch.manual_seed(seed)
    width = sizes["width"] // 2
    config = transformers.ResNetConfig(
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=int(labels.max()) + 1,
    )
    model = transformers.ResNetForImageClassification(config)

    def loss(own: Any, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(own(_shifted(pixels[rows])).logits, labels[rows], label_smoothing=0.1)

    train(model, len(pixels), loss, sizes["epochs"], seed, to)


def _shifted(pixels: torch.Tensor) -> torch.Tensor:
    """The same images, moved by up to two pixels."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return pixels.roll((down, right), (2, 3))


def make_tokenizer(names: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel(unk_token="<unknown>"))
    own.normalizer = normalizers.Lowercase()
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<end>", "<start>", "<unknown>"]
    own.train_from_iterator(names, trainers.WordLevelTrainer(min_frequency=2, special_tokens=special))
    ends = [(token, own.token_to_id(token)) for token in ("<start>", "<end>")]
    own.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unknown>", eos_token="<end>", pad_token="<end>", model_max_length=16
    )


def train_clip(
    pixels: torch.Tensor, names: Sequence[str], tokenizer: Any, sizes: dict[str, Any], seed: int, to: Path
) -> None:
    torch.manual_seed(seed)
    width, end = sizes["width"], tokenizer.convert_tokens_to_ids("<end>")
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    # An id of 2 would mean CLIP's first release, which looked for the largest id instead.
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": end, "bos_token_id": 1}
    image = tower | {"image_size": sizes["side"], "patch_size": sizes["side"] // 4}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=width, logit_scale_init_value=2.0)
    )
    tokens = tokenizer(list(names), padding=True, truncation=True, return_tensors="pt")

    def loss(own: Any, rows: torch.Tensor) -> torch.Tensor:
        texts = {key: tokens[key][rows] for key in ("input_ids", "attention_mask")}
        output = own(pixel_values=_shifted(pixels[rows]), **texts, return_loss=True)
        found: torch.Tensor = output.loss
        return found

    train(model, len(pixels), loss, sizes["epochs"], seed, to)
    for folder in to.iterdir():
        tokenizer.save_pretrained(folder)


def score(root: Path, task: dict[str, Any], part: int, sizes: dict[str, Any]) -> pa.Table:
    """A part's scores by a recipe, with the checkpoints that were not trained on it."""
    runs = [root / f"part-{part}/seed-{seed}" for seed in range(sizes["seeds"])]
    early, last = (f"epoch-{epoch}" for epoch in (sizes["epochs"][0], sizes["epochs"][-1]))
    paths = {f"last{i}": own / last for i, own in enumerate(runs)} | {"early": runs[0] / early}
    recipe = {
        "version": 1,
        "corpus": {"path": str(root / f"part-{part}.parquet")},
        "task": task | {"preprocessor": preprocessor(sizes["side"])},
        "models": {name: {"kind": "transformers", "path": str(path)} for name, path in paths.items()},
        "methods": [
            {"method": "ensemble", "models": [f"last{i}" for i in range(len(runs))]},
            {"method": "grad_mimic", "model": "early", "reference": "last0"},
        ],
        "output": str(root / "scores"),
    }
    path = root / f"part-{part}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    summary = run(load_recipe(str(path)), rescore=True)
    assert summary.clean, summary.lines()
    return pq.read_table(root / f"scores/part-{part}.parquet")


def experiment(
    emoji: Sequence[Emoji], root: Path, kind: str, sizes: dict[str, Any]
) -> tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Every score of every emoji, higher where it looks right, and which are wrong; ``kind`` is a recipe's task."""
    pixels, parts = pixels_of(emoji, sizes["side"]), np.arange(len(emoji)) * sizes["parts"] // len(emoji)
    categories = sorted({e.category for e in emoji})
    labels = torch.tensor([categories.index(e.said_category) for e in emoji])
    names = [e.said_name for e in emoji]
    classes = {"kind": kind, "image_column": "image", "label_column": "label", "classes": len(categories)}
    task = classes if kind == "classification" else {"kind": kind, "group": min(64, len(emoji) // sizes["parts"])}
    tables = []
    for part in range(sizes["parts"]):
        others = torch.from_numpy(np.flatnonzero(parts != part))
        for seed in range(sizes["seeds"]):
            to = root / f"part-{part}/seed-{seed}"
            if kind == "classification":
                train_classifier(pixels[others], labels[others], sizes, seed, to)
            else:
                own = [names[i] for i in others.tolist()]
                train_clip(pixels[others], own, make_tokenizer(own), sizes, seed, to)
        rows = np.flatnonzero(parts == part).tolist()
        images = [{"bytes": emoji[i].png, "path": None} for i in rows]
        columns = {"image": images, "label": [int(labels[i]) for i in rows], "text": [names[i] for i in rows]}
        pq.write_table(pa.table(columns), root / f"part-{part}.parquet")
        tables.append(score(root, task, part, sizes))
    table = pa.concat_tables(tables)
    assert len(table) == len(emoji)
    wrong = np.array([e.wrong[0 if kind == "classification" else 1] for e in emoji])
    return _towards_right(table) | _controls(emoji, kind), wrong


def _towards_right(table: pa.Table) -> dict[str, np.ndarray[Any, Any]]:
    """The columns that say which end to keep, turned so that it is the high one."""
    scores = {}
    for field in table.schema:
        keep = (field.metadata or {}).get(b"keep", b"").decode()
        if keep in ("high", "low"):
            scores[field.name] = table[field.name].to_numpy() * (1 if keep == "high" else -1)
    scores["loss"] = -table["loss"].to_numpy()
    return scores


def _controls(emoji: Sequence[Emoji], kind: str) -> dict[str, np.ndarray[Any, Any]]:
    controls = {
        "random (control)": np.random.default_rng(0).random(len(emoji)),
        "size of the file (control)": np.array([float(len(e.png)) for e in emoji]),
    }
    if kind == "contrastive":
        controls["length of the name (control)"] = np.array([float(len(e.said_name)) for e in emoji])
    return controls


def judged(scores: dict[str, np.ndarray[Any, Any]], wrong: np.ndarray[Any, Any]) -> dict[str, dict[str, float]]:
    """By score the AUROC of finding what is wrong, and the share of it among as many lowest as there are wrong ones."""
    worst = {name: np.argsort(values, kind="stable")[: wrong.sum()] for name, values in scores.items()}
    return {
        name: {"auroc": float(roc_auc_score(wrong, -values)), "precision": float(wrong[worst[name]].mean())}
        for name, values in scores.items()
    }


def main() -> None:
    parser = options.parser(__doc__)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="with the vendors' packages")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="emoji-") as temporary:
        paths = packages(Path(folder or temporary))
        emoji = [e for path, vendor in zip(paths, VENDORS, strict=True) for e in read_package(path, vendor)]
        emoji = planted(emoji, WRONG, seed=0)
        cases = []
        for kind in ("classification", "contrastive"):
            began = time.perf_counter()
            root = Path(temporary) / kind
            sizes = SIZES | {"epochs": EPOCHS[kind]}
            scores, wrong = experiment(emoji, root, kind, sizes)
            cases.append({"task": kind, "images": len(emoji), "wrong": int(wrong.sum()), "sizes": sizes})
            cases[-1] |= {"scores": judged(scores, wrong), "seconds": round(time.perf_counter() - began)}
            show(cases[-1])
    path = RESULTS / "quality-emoji.json"
    path.write_text(dumps({"machine": machine(), "packages": VERSION, "cases": cases}, indent=1) + "\n")
    print("written to", path.name)


def show(case: dict[str, Any]) -> None:
    what = "labels" if case["task"] == "classification" else "captions"
    table = Table(title=f"{case['wrong']:,} wrong {what} among {case['images']:,} emoji")
    for name in ("score", "AUROC", "precision"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, found in sorted(case["scores"].items(), key=lambda item: -item[1]["auroc"]):
        table.add_row(name, f"{found['auroc']:.3f}", f"{found['precision']:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
