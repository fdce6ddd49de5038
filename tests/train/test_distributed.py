"""Two gloo processes train as one does on both their batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from assay.methods import GradMimic, GraNd, InRunInfluence
from assay.tasks import Classification
from assay.train import Reweighter, token_weights
from tests.train.small_models import classifier, moved

MODES = {"reweight": {}, "filter": {"keep": 0.5}, "observe": {"exact": False}, "in_run": {}, "each": {}}
# By where the batch is cut: mode and layers. The plain mean over ranks of different sizes is not that over all samples,
# so that there everything is reweighted, or each sample has a scale of its own.
RUNS = {
    4: [("reweight", None), ("reweight", "2"), ("filter", None), ("filter", "2"), ("observe", None)],
    3: [("reweight", None), ("filter", None), ("in_run", None), ("each", "2")],
}


def problem() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model = classifier()
    return model, moved(model, by=0.1), torch.randn(2, 8, 4), torch.randint(3, (2, 8))


def train(rows: slice | list[int], wrap: bool, mode: str, layers: str | None) -> dict[str, Tensor]:
    """Two steps of SGD on the rows of a step's batch."""
    model, reference, x, y = problem()
    held_out = {"all": [(torch.randn(8, 4)[rows], torch.randint(3, (8,))[rows])]}  # each rank has some of them
    if mode == "in_run":
        method = InRunInfluence(model, Classification(), held_out, normalise=True)
    else:
        method = GradMimic(model, reference, Classification())
    how = "reweight" if mode in ("in_run", "each") else mode
    reweighter = Reweighter(model, method, how, 0.2, layers, **MODES[mode])
    run = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(2):
        optimizer.zero_grad()
        losses = F.cross_entropy(run(x[step][rows]), y[step][rows], reduction="none")
        share = len(losses) * (2 if wrap else 1) / 8  # of the global batch in this rank's mean
        scale: float | Tensor = torch.full_like(losses, share, requires_grad=False) if mode == "each" else 1.0
        reweighter.backward(losses, ids=torch.arange(8)[rows], scale=scale)
        optimizer.step()
    assert reweighter.weights is not None
    return {**model.state_dict(), "weights": reweighter.weights}


def refusal_of_sharded_weights() -> str:
    model = problem()[0]
    method = GraNd(model, Classification())
    fully_shard(model)
    try:
        Reweighter(model, method)
    except ValueError as error:
        return str(error)
    return ""


class Placed(nn.Module):
    """Its places are shared by all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.places)


def complaint(layers: str | None, **settings: bool) -> str:
    """What a Reweighter says of a wrapper's settings; it would train without the other ranks."""
    model, (_, _, x, y) = Placed(), problem()
    reweighter = Reweighter(model, GraNd(model, Classification(), layers), layers=layers)
    run = DistributedDataParallel(model, **settings)
    try:
        reweighter.backward(F.cross_entropy(run(x[0]), y[0], reduction="none"))
    except RuntimeError as error:
        return str(error)
    return ""


def complaint_of_shards() -> str:
    """The same of a model that is sharded behind the Reweighter's back."""
    model, (_, _, x, y) = Placed(), problem()
    reweighter = Reweighter(model, GraNd(model, Classification(), "head"), layers="head", verify=False)
    fully_shard(model)
    try:
        reweighter.backward(F.cross_entropy(model(x[0]), y[0], reduction="none"))
    except ValueError as error:
        return str(error)
    return ""


def token_weights_of(rows: slice) -> Tensor:
    """Of texts of which two ranks have different numbers, with excess losses that tie across them."""
    losses = torch.tensor([[3.0, 1, 2], [0, 2, 5], [2, 4, 1]])
    return token_weights(losses[rows], torch.zeros(3, 3)[rows], 0.5, losses[rows] > 0)


def complaint_of_tokens(rank: int) -> str:
    """Of a loss that is not finite on one rank: the other would wait for it."""
    try:
        token_weights(torch.full((1, 2), torch.nan if rank else 1.0), torch.zeros(1, 2), 0.5)
    except RuntimeError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[Any, Any] = {}
    for cut in (4, 3):
        rows = slice(0, cut) if rank == 0 else slice(cut, 8)
        found |= {(cut, mode, layers): train(rows, True, mode, layers) for mode, layers in RUNS[cut]}
    found["tokens"] = token_weights_of(slice(0, 1) if rank == 0 else slice(1, 3))
    assert "2 of the batch's 4 counted losses are not finite" in complaint_of_tokens(rank)
    found["refused"] = refusal_of_sharded_weights()
    assert "is sharded (of FSDP2" in complaint_of_shards()
    assert "static_graph=True" in complaint("head", static_graph=True)
    assert "(find_unused_parameters=True) looks for" in complaint(None, find_unused_parameters=True)
    assert not complaint("head", find_unused_parameters=True)
    assert not complaint(None, gradient_as_bucket_view=True)
    torch.save(found, Path(folder) / f"found{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        assert "parameter '0.weight' is sharded (of FSDP2" in found.pop("refused")
        texts = slice(0, 1) if rank == 0 else slice(1, 3)
        assert torch.equal(found.pop("tokens"), token_weights_of(slice(0, 3))[texts])
        for (cut, mode, layers), values in found.items():
            one = train(slice(0, 8), False, mode, layers)
            for name, value in values.items():
                own = slice(0, cut) if rank == 0 else slice(cut, 8)
                expected = one[name][own] if name == "weights" else one[name]
                what = f"{cut} {mode} {layers} {name}"
                torch.testing.assert_close(value, expected, msg=what, rtol=1e-5, atol=1e-6)
