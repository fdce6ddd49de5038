"""Rows that a plain scan makes a method's scores of: the method's own, and what int8 leaves of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import assay
from assay.corpus.features import quantize
from assay.methods import LESS, TRAK, Influence, Kernel, LoGra, TrackStar
from assay.ops import scan_scores, topk_scan
from assay.probe import Probe
from assay.tasks import Classification
from tests.methods.small_problem import POOL

SKETCH = assay.Kronecker(3, 3)
MAKERS: dict[str, Callable[..., Influence]] = {
    "trak": lambda models, targets: TRAK(models, Classification(), targets, sketch=SKETCH),
    "logra": lambda models, targets: LoGra(models, Classification(), targets, sketch=SKETCH),
    "trackstar": lambda models, targets: TrackStar(models, Classification(), targets, sketch=SKETCH),
    "less": lambda models, targets: LESS(models, Classification(), targets, optimizers=None, weights=[1, 3]),
    "whitened": lambda models, targets: Influence(
        models, Classification(), targets, Kernel(damping=0.1, blocks=True, whiten=True), SKETCH
    ),
}


def kept(method: Influence, pool: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor] | None]:
    needs = method.needs().items()
    probes = {role: Probe(n.model, n.task, reductions=n.reductions, logits=False) for role, n in needs}
    return method.raw_features({role: probe(pool) for role, probe in probes.items()})


@pytest.mark.parametrize("kind", MAKERS)
def test_a_plain_scan_of_the_rows_gives_the_methods_scores(problem: Any, kind: str) -> None:
    models, (x, y), target = problem
    x = x.clone()
    x[7] = torch.nan
    method = MAKERS[kind](models, {"a": [target], "b": [(x[:2], y[:2])]}).fit([(x, y)])
    features, extras = kept(method, (x, y))
    want, rows, queries = (
        method.score_features(features, extras),
        method.scan_rows(features, extras),
        method.scan_queries(),
    )
    assert rows.shape == (POOL, queries.shape[1])
    assert rows.dtype == torch.float32
    each = scan_scores(rows, queries, reduce="none")
    for own, name in zip(each, ("a", "b"), strict=True):
        scores = want[f"{method.name}_{name}"]
        assert bool(scores.isnan()[7])
        torch.testing.assert_close(
            own, scores, rtol=2e-5, atol=2e-6 * float(scores[~scores.isnan()].abs().max()), equal_nan=True
        )
    values, best = topk_scan(rows, queries, 5, reduce=method.kernel.across)
    torch.testing.assert_close(values, want[method.name].nan_to_num(-torch.inf).topk(5).values, rtol=1e-4, atol=1e-6)
    assert 7 not in best


def test_int8_rows_rank_as_float32_ones_at_about_a_quarter_of_the_bytes(problem: Any) -> None:
    models, pool, target = problem
    method = MAKERS["whitened"](models, {"t": [target]}).fit([pool])
    rows, queries = method.scan_rows(*kept(method, pool)), method.scan_queries()
    small, scales = quantize(rows)
    exact, rounded = (
        scan_scores(*args, queries, **own) for args, own in (((rows,), {}), ((small,), {"scales": scales}))
    )
    assert spearmanr(exact, rounded)[0] > 0.999
    assert small.nbytes + scales.nbytes < 0.35 * rows.nbytes
    assert bool(rounded.isfinite().all())


def test_before_fit_there_are_none(problem: Any) -> None:
    models, pool, target = problem
    method = MAKERS["logra"](models, {"t": [target]})
    for make in (method.scan_queries, lambda: method.scan_rows([torch.zeros(1, 1)] * 2)):
        with pytest.raises(RuntimeError, match=r"logra: call fit\(\) before scoring"):
            make()
    method.fit([pool])
    with pytest.raises(ValueError, match=r"logra: expected features \(B, "):
        method.scan_rows([torch.zeros(1, 1)] * 2)
