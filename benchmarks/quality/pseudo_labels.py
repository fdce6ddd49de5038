"""Are thresholds of pseudo-labels worth choosing class by class? ``python -m benchmarks.quality.pseudo_labels``.

scikit-learn's digits. A logistic regression learned 60 of them and labels the others; its confidence in the label is
the score, and a pseudo-label is worth keeping where it is right. 400 of the labels, at random, are audited: the cut
that maximises F_β on them, one for all (``fbeta_cut``) and one for each predicted class (``fbeta_cuts``; 2210.10221),
beside the controls: the fixed threshold .9, all pseudo-labels, and as many at random as the classes' cuts keep. F_β
on the labels that were not audited, and the test accuracy of a student that learns from the 60 and what is kept. The
same with the score shifted in five of the classes, as confidences of a detector are that learned some classes from
more images. β = 1 and 0.5, ten seeds.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import fbeta_score

from assay import select
from assay._json import dumps
from benchmarks import options
from benchmarks.timing import RESULTS, machine

SEEDS, LABELLED, AUDITED, TEST, SHIFT = 10, 60, 400, 400, 0.3
Mask = npt.NDArray[np.bool_]


def one_seed(seed: int, beta: float, shift: float) -> dict[str, dict[str, float]]:
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    x, y = x[order] / 16, y[order]
    first, pool, test = slice(0, LABELLED), slice(LABELLED, len(x) - TEST), slice(len(x) - TEST, None)
    teacher = LogisticRegression(C=1.0, max_iter=500).fit(x[first], y[first])
    p = teacher.predict_proba(x[pool])
    label = teacher.classes_[p.argmax(1)]
    score = p.max(1) - shift * np.isin(label, rng.permutation(10)[:5])
    right = label == y[pool]
    table = pa.table({"score": score.astype(np.float32), "label": label.astype(str)})
    audited = np.zeros(len(score), bool)
    audited[rng.choice(len(score), AUDITED, replace=False)] = True
    sample, good = table.filter(pa.array(audited)), right[audited]
    names = sample["label"].to_pylist()
    one = select.fbeta_cut(sample, "score", good, beta, seed, "high", draws=2)
    each = select.fbeta_cuts(sample, "score", good, names, beta, seed, "high", draws=2)
    own: Mask = select.cut_groups(table, "score", each, "label", "high").mask
    kept = {
        "a cut for each class": own,
        "one cut": score >= one.threshold,
        "threshold .9": score >= 0.9,
        "all": np.ones(len(score), bool),
        "random": rng.random(len(score)) < own.mean(),
    }
    found = {}
    for name, mask in kept.items():
        rows, labels = np.concatenate([x[first], x[pool][mask]]), np.concatenate([y[first], label[mask]])
        student = LogisticRegression(C=1.0, max_iter=500).fit(rows, labels)
        found[name] = {
            "kept": float(mask.mean()),
            "F": float(fbeta_score(right[~audited], mask[~audited], beta=beta)),
            "student": float(student.score(x[test], y[test])),
        }
    found["classes with a cut of their own"] = {"classes": float(len(each.cuts))}
    return found


def main() -> None:
    options.parser(__doc__).parse_args()
    began, console, results = time.perf_counter(), Console(), {}
    for shift in (0.0, SHIFT):
        for beta in (1.0, 0.5):
            name = f"beta {beta:g}, five classes shifted by {shift:g}"
            runs: list[dict[str, Any]] = [one_seed(seed, beta, shift) for seed in range(SEEDS)]
            results[name] = runs
            table = Table(title=f"{name}, {SEEDS} seeds")
            for column in ("pseudo-labels", "kept", "F on rows not audited", "student's accuracy"):
                table.add_column(column)
            for kind in list(runs[0])[:-1]:
                means = [statistics.fmean(run[kind][key] for run in runs) for key in ("kept", "F", "student")]
                table.add_row(kind, *(f"{mean:.3f}" for mean in means))
            console.print(table)
    settings = {"seeds": SEEDS, "labelled": LABELLED, "audited": AUDITED}
    found = {**machine(), **settings, "seconds": time.perf_counter() - began, "runs": results}
    (RESULTS / "quality-pseudo-labels.json").write_text(dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
