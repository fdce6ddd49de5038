"""The worked loop under Accelerate: a plain loop's training, and what would lose weights or samples."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from assay.methods import GradMimic
from assay.tasks import Classification
from assay.train import Reweighter, WeightedSampler
from tests.train.small_models import classifier, moved, samples

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """Accelerate has one state for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def make() -> tuple[nn.Module, Reweighter, torch.optim.Optimizer]:
    net = classifier()
    reweighter = Reweighter(net, GradMimic(net, moved(net, by=0.3), Classification()), temperature=0.1)
    return net, reweighter, torch.optim.SGD(net.parameters(), lr=0.5)


def losses_of(net: nn.Module, batch: dict) -> torch.Tensor:
    return F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")


@pytest.mark.parametrize(("steps", "precision"), [(1, "no"), (2, "no"), (2, "bf16")])
def test_training_is_that_of_a_plain_loop(steps, precision, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=steps, mixed_precision=precision)
    net, reweighter, optimizer = make()
    prepared, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(samples(), batch_size=6))
    accelerator.register_for_checkpointing(reweighter)
    for batch in loader:
        with accelerator.accumulate(prepared):
            reweighter.backward(losses_of(prepared, batch), batch["id"], scale=1 / steps)
            optimizer.step()
            optimizer.zero_grad()
    plain, by_hand, plainly = make()
    for i, batch in enumerate(DataLoader(samples(), batch_size=6)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = plain(batch["x"]).float()
        by_hand.backward(F.cross_entropy(logits, batch["y"], reduction="none"), batch["id"], scale=1 / steps)
        if (i + 1) % steps == 0:
            plainly.step()
            plainly.zero_grad()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert reweighter.table() == by_hand.table()
    assert reweighter.table()["weight"].to_numpy().std() > 0.05
    table = reweighter.table()
    accelerator.save_state(str(tmp_path))
    reweighter.load_state_dict(make()[1].state_dict())
    accelerator.load_state(str(tmp_path))
    assert (reweighter.step, reweighter.table()) == (4, table)


def test_accelerators_own_backward_is_an_error_before_a_second_step():
    accelerator = accelerate.Accelerator(cpu=True)
    net, _, optimizer = make()
    prepared, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(samples(), batch_size=6))
    done = 0

    def train():
        nonlocal done
        for batch in loader:
            accelerator.backward(losses_of(prepared, batch).mean())
            optimizer.step()
            done += 1

    with pytest.raises(RuntimeError, match="backward"):
        train()
    assert done == 1


def test_two_processes_share_a_weighted_sampler_out():
    def make_sampler():
        table = pa.table({"weight": [float(i) for i in range(24)]})
        return WeightedSampler(table, "weight", world_size=1, num_samples=15, replacement=False)

    def epochs(rank):
        loader = DataLoader(samples(), batch_size=3, sampler=make_sampler(), drop_last=True)
        prepare = accelerate.data_loader.prepare_data_loader
        shared = prepare(loader, num_processes=2, process_index=rank, put_on_device=False)
        return [[batch["id"] for batch in shared] for _ in range(2)]

    whole = make_sampler()
    for first, second in zip(epochs(0), epochs(1), strict=True):
        drawn = [f"s{i}" for i in whole]
        assert (first, second) == ([drawn[:3], drawn[6:9]], [drawn[3:6], drawn[9:12]])
