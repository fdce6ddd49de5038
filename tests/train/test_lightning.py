"""The callback's training is the loop's own, and what would train unweighted is an error."""

from __future__ import annotations

import copy
import logging
import os
import socket
import warnings

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from assay.methods import GradMimic
from assay.tasks import Classification
from assay.train import Reweighter, WeightedSampler
from tests.train.small_models import ROWS, classifier, moved, samples

L = pytest.importorskip("lightning.pytorch")
from assay.train.lightning import ReweightCallback  # noqa: E402

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
}


class Module(L.LightningModule):
    """Returns what ``losses`` makes of the logits, by default one loss per sample."""

    def __init__(self, returned=lambda module, losses: losses, manual=False):
        super().__init__()
        self.net = classifier()
        self.returned, self.automatic_optimization = returned, not manual

    def training_step(self, batch, batch_idx):
        return self.returned(self, F.cross_entropy(self.net(batch["x"]), batch["y"], reduction="none"))

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch["x"]), batch["y"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def make_reweighter(net: nn.Module) -> Reweighter:
    torch.manual_seed(2)
    return Reweighter(net, GradMimic(net, moved(net, by=0.3), Classification()), temperature=0.1)


def fit(module, path, callback=None, ckpt_path=None, epochs=1, **settings):
    callback = callback or ReweightCallback(make_reweighter(module.net), ids="id")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback], default_root_dir=path, **{**QUIET, **settings})
    loader = DataLoader(samples(), batch_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return callback.reweighter, trainer


def loop(accumulate: int) -> tuple[nn.Module, Reweighter]:
    """The same by hand."""
    net = Module().net
    reweighter, optimizer = make_reweighter(net), torch.optim.SGD(net.parameters(), lr=0.5)
    for i, batch in enumerate(DataLoader(samples(), batch_size=6)):
        losses = F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")
        reweighter.backward(losses, batch["id"], scale=1 / accumulate)
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net, reweighter


def assert_same(module, reweighter, accumulate=1):
    net, by_hand = loop(accumulate)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(module.net.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert reweighter.table()["id"].to_pylist() == [row["id"] for row in samples()]
    ours, theirs = (torch.tensor(r.table()["weight"].to_pylist()) for r in (reweighter, by_hand))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours - 1).abs().max()) > 0.05


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_that_of_a_loop(accumulate, tmp_path):
    module = Module(lambda module, losses: {"loss": losses})
    reweighter, _ = fit(module, tmp_path, accumulate_grad_batches=accumulate)
    assert_same(module, reweighter, accumulate)
    assert "backward" not in vars(module)


def test_what_a_method_asks_for_beside_losses_comes_from_the_step(tmp_path):
    def step(module, losses):
        return {"loss": losses, "reference_losses": losses.detach() / 4, "logits": losses[:, None]}

    module = Module(step)
    net = module.net
    method = GradMimic(net, moved(net, by=0.3), Classification())
    reweighter, _ = fit(module, tmp_path, ReweightCallback(Reweighter(net, method, by="rho"), ids="id"))
    table = reweighter.table()
    rho, loss = (torch.tensor(table[name].to_pylist()) for name in ("rho", "loss"))
    torch.testing.assert_close(rho, 0.75 * loss)
    assert "training_step" not in vars(module)


def manually(module, losses):
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(losses)
    optimizer.step()


def test_manual_optimization(tmp_path):
    module = Module(manually, manual=True)
    assert_same(module, fit(module, tmp_path)[0])


def test_the_loss_scale_stays_out_of_the_scores(tmp_path):
    """Scaled and unscaled again, without half precision in between."""
    from lightning.pytorch.plugins import MixedPrecision

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = Module()
    reweighter, _ = fit(module, tmp_path, plugins=[Scaled("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 1024
    assert_same(module, reweighter)


def test_its_table_is_in_the_checkpoint(tmp_path):
    module = Module()
    whole, _ = fit(module, tmp_path, epochs=2)
    first, trainer = fit(Module(), tmp_path)
    assert (first.step, whole.step) == (4, 8)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module()
    reweighter, _ = fit(resumed, tmp_path, ckpt_path=tmp_path / "half.ckpt", epochs=2)
    assert reweighter.step == 8
    assert reweighter.table()["step"].to_pylist() == whole.table()["step"].to_pylist()
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(resumed.net.state_dict()[name], value)


def test_a_weighted_sampler_serves_it(tmp_path):
    table = pa.table({"weight": [1.0] * 12 + [0.0] * 12})
    loader = DataLoader(samples(), batch_size=6, sampler=WeightedSampler(table, "weight", world_size=1, num_samples=6))
    module = Module()
    callback = ReweightCallback(make_reweighter(module.net))
    trainer = L.Trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, loader)
    assert callback.reweighter.step == 3
    assert loader.sampler.epoch == 2


class OwnBackward(Module):
    def backward(self, loss):
        loss.mean().backward()


def past_it(module, losses):
    losses.mean().backward()
    module.optimizers().step()


@pytest.mark.parametrize(
    ("module", "callback", "settings", "message"),
    [
        (Module(lambda module, losses: losses.mean()), None, {}, "expected one per sample, (B,): reduction='none'"),
        (Module(past_it, manual=True), None, {}, "the backward pass went past the Reweighter"),
        (OwnBackward(), None, {}, "OwnBackward.backward is its own"),
        (Module(), ReweightCallback(make_reweighter(Module().net)), {}, "is no part of Module"),
        (Module(), "key", {}, "ids='key': the batch has no such entry, it has x, y, id"),
        (Module(), lambda batch: batch["id"][:1] * 6, {}, "is in the batch of step 1 more than once"),
        (Module(), lambda batch: batch["id"][:5], {}, "expected one per sample, 6, found 5"),
    ],
)
def test_what_would_train_unweighted_is_an_error_before_the_optimizer_steps(
    module, callback, settings, message, tmp_path
):
    if callback is not None and not isinstance(callback, ReweightCallback):
        callback = ReweightCallback(make_reweighter(module.net), ids=callback)
    before = copy.deepcopy(module.net.state_dict())
    with pytest.raises((ValueError, RuntimeError)) as error:
        fit(module, tmp_path, callback, **settings)
    assert message in str(error.value)
    assert all(torch.equal(value, module.net.state_dict()[name]) for name, value in before.items())
    assert "backward" not in vars(module)


def make_sampler() -> WeightedSampler:
    weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(3))
    table = pa.table({"weight": weights.tolist()})
    return WeightedSampler(table, "weight", world_size=1, num_samples=12, replacement=False)


def work(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ.pop("PL_GLOBAL_SEED", None)
    module = Module()
    callback = ReweightCallback(make_reweighter(module.net), ids="id")
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], devices=2, strategy="ddp", default_root_dir=folder, **QUIET)
    trainer.fit(module, DataLoader(samples(), batch_size=3, sampler=make_sampler()))
    torch.save({**module.net.state_dict(), "ids": callback.reweighter.table()["id"].to_pylist()}, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_one_and_share_a_sampler_out(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    net, sampler, data = Module().net, make_sampler(), samples()
    reweighter, optimizer = make_reweighter(net), torch.optim.SGD(net.parameters(), lr=0.5)
    for epoch in range(2):
        drawn = list(sampler)
        # Lightning's wrapper shuffles what it wraps, as torch's DistributedSampler does.
        order = torch.randperm(12, generator=torch.Generator().manual_seed(epoch)).tolist()
        for batch in DataLoader([data[drawn[i]] for i in order], batch_size=6):
            optimizer.zero_grad()
            losses = F.cross_entropy(net(batch["x"]), batch["y"], reduction="none")
            reweighter.backward(losses, batch["id"])
            optimizer.step()
    ids = reweighter.table()["id"].to_pylist()
    assert found[0].pop("ids") == ids[::2]
    assert found[1].pop("ids") == ids[1::2]
    for state in found:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
