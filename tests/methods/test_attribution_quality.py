"""Do the scores predict retraining, and find wrong labels? Small versions of ``benchmarks/quality``, fixed seeds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import EKFAC, TRAK
from assay.tasks import Classification

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks.quality import lds, self_influence  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def logistic() -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = lds.one("logistic regression", subsets=32, with_peers=False)["lds"]
    return table


def test_exact_influence_predicts_retraining(logistic) -> None:
    assert logistic["exact influence"]["lds"] >= 0.95


def test_methods_predict_retraining_better_than_the_controls(logistic) -> None:
    controls = max(logistic["random"]["interval"][1], logistic["reference loss (control)"]["interval"][1])
    for method in ("TRAK, K = 1", "TRAK, K = 10", "LESS", "LoGra", "TrackStar", "EK-FAC"):
        assert logistic[method]["interval"][0] > controls, method
    assert logistic["DsDm, K = 10 (tasks: the classes)"]["lds"] > 0.5  # and its sign is right
    assert abs(logistic["random"]["lds"]) < 0.1


def test_checkpoints_average_projection_errors_away(logistic) -> None:
    """With one projection for all of them, ten checkpoints reach .52 instead of .80."""
    assert logistic["TRAK, K = 10"]["lds"] > logistic["TRAK, K = 1"]["lds"] + 0.2


@pytest.mark.parametrize("sketch", [assay.Kronecker(8, 8), assay.Mask(8, 8, then=assay.Sparse(64))], ids=str)
def test_every_checkpoint_has_a_projection_of_its_own(sketch: assay.Kronecker | assay.Mask) -> None:
    data = (torch.randn(2, 3), torch.zeros(2, dtype=torch.long))
    method = TRAK([nn.Linear(3, 2)] * 3, Classification(), {"t": [data]}, sketch=sketch)
    assert method.sketch_of(0) == sketch
    assert len({method.sketch_of(k) for k in range(3)}) == 3
    if isinstance(sketch, assay.Mask):
        inner = method.sketch_of(1).then
        assert inner is not None
        assert inner == replace(sketch.then, seed=1)


def test_ekfac_of_a_convolution_is_that_of_the_linear_layer_it_is() -> None:
    """A kernel as large as its input is a linear layer; its curvature must be factored, not a diagonal."""
    torch.manual_seed(0)
    flat = nn.Linear(12, 4, bias=False)
    convolution = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2, bias=False), nn.Flatten())
    with torch.no_grad():
        convolution[1].weight.copy_(flat.weight.view(4, 3, 2, 2))
    pool, target = ((torch.randn(n, 12), torch.randint(4, (n,))) for n in (60, 3))
    found = []
    for model in (flat, convolution):
        method = EKFAC(model, Classification(), {"t": [target]}, self_influence=True, true_fisher=False).fit([pool])
        table = assay.score([pool], [method])
        found.append(torch.tensor(np.stack([table["ekfac"].to_numpy(), table["ekfac_self"].to_numpy()])))
        assert method.metadata()["factored_parameters"] == "1 of 1"
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["MLP", "CNN"])
def test_self_influence_finds_wrong_labels(kind: str) -> None:
    found = self_influence.one(kind, seed=0)
    for fisher in ("EK-FAC, true Fisher", "EK-FAC, empirical Fisher"):
        assert found[fisher]["top 10 %"] >= 0.8
        assert found[fisher]["top 20 %"] >= 0.97
    assert found["random"]["top 20 %"] < 0.35
