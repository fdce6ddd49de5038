"""In-run influence is the first-order fall of the held-out loss, at the weights as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import InRunInfluence
from assay.tasks import Classification
from assay.train import Reweighter

TASK = Classification()


def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1])


def gradients(model: nn.Module, data: tuple[Tensor, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model, data), list(model.parameters())))


def expected(model: nn.Module, data: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Tensor:
    towards = gradients(model, held_out)
    each = [gradients(model, (x[None], y[None])) for x, y in zip(*data, strict=True)]
    return torch.stack([sum((g * t).sum() for g, t in zip(own, towards, strict=True)) for own in each])


def test_it_is_what_a_step_on_the_sample_does_to_the_held_out_loss() -> None:
    model, data, held_out = net().eval().double(), batch(5, 0), batch(9, 1)
    data, held_out = ((x.double(), y) for x, y in (data, held_out))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)
    loss(model, data).backward()
    optimizer.step()
    method = InRunInfluence(model, TASK, {"t": [held_out]}, optimizer=optimizer).fit()
    scores = assay.score([data], [method])["in_run"].to_numpy()
    before = loss(model, held_out)
    for i, score in enumerate(scores):
        other = copy.deepcopy(model)
        sample = data[0][i : i + 1], data[1][i : i + 1]
        for p, own, g in zip(other.parameters(), model.parameters(), gradients(model, sample), strict=True):
            rate = 1e-3 / (optimizer.state[own]["square_avg"].sqrt() + 1e-8)
            p.data -= 1e-4 * rate * g
        assert float((before - loss(other, held_out)).detach()) / 1e-4 == pytest.approx(
            float(score), rel=1e-2, abs=1e-5
        )


@pytest.mark.parametrize("name", ["t", "u"])
def test_the_mean_of_all_batches_and_both_targets(name) -> None:
    model, data = net().eval(), batch(5, 0)
    whole = {"t": batch(6, 1), "u": batch(4, 2)}
    targets = {t: [(x[:3], y[:3]), (x[3:], y[3:])] for t, (x, y) in whole.items()}
    table = assay.score([data], [InRunInfluence(model, TASK, targets).fit()])
    torch.testing.assert_close(
        torch.tensor(table[f"in_run_{name}"].to_numpy()), expected(model, data, whole[name]), rtol=1e-4, atol=1e-6
    )


def test_at_length_1() -> None:
    model, data, held_out = net().eval(), batch(5, 0), batch(6, 1)
    table = assay.score([data], [InRunInfluence(model, TASK, {"t": [held_out]}, normalise=True).fit()])
    length = torch.cat([g.flatten() for g in gradients(model, held_out)]).norm()
    torch.testing.assert_close(
        torch.tensor(table["in_run"].to_numpy()), expected(model, data, held_out) / length, rtol=1e-4, atol=1e-6
    )


class Read:
    """Batches that count how often they were gone through."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.rounds = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.rounds += 1
        return iter(self.batches)


def test_in_a_trainer_each_step_takes_the_next_batch_at_the_weights_as_they_are() -> None:
    model, held_out = net().train(), [batch(4, 1), batch(5, 2)]
    turns = Read(held_out)
    reweighter = Reweighter(model, InRunInfluence(model, TASK, {"t": turns}), temperature=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        data = batch(5, 10 + step)
        optimizer.zero_grad()
        torch.manual_seed(step)
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
        random = torch.get_rng_state()
        noisy = copy.deepcopy(model)  # of this step, before it moves
        twin = copy.deepcopy(model).eval()
        reweighter.backward(losses, range(5))
        assert torch.equal(torch.get_rng_state(), random)
        assert model.training
        assert all(p.requires_grad for p in model.parameters())
        masked = [gradients_under_dropout(noisy, data, i, step) for i in range(5)]
        towards = gradients(twin, held_out[(step + 1) % 2])  # the first was taken when the Reweighter was made
        score = torch.stack([sum((g * t).sum() for g, t in zip(own, towards, strict=True)) for own in masked])
        got = torch.tensor(reweighter.table()["in_run"].to_numpy()[-5:])
        torch.testing.assert_close(got, score, rtol=1e-4, atol=1e-6)
        optimizer.step()
    assert turns.rounds == 3


def gradients_under_dropout(model: nn.Module, data: tuple[Tensor, Tensor], i: int, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
    return list(torch.autograd.grad(losses[i], list(model.parameters())))


def test_an_optimizer_that_has_made_no_step_is_one_error_and_a_warm_up_helps() -> None:
    def run(warmup: int) -> Reweighter:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        method = InRunInfluence(model, TASK, {"t": [batch(4, 1)]}, optimizer=optimizer)
        reweighter = Reweighter(model, method, warmup_steps=warmup)
        for step in range(2):
            data = batch(5, step)
            optimizer.zero_grad()
            reweighter.backward(F.cross_entropy(model(data[0]), data[1], reduction="none"), range(5))
            optimizer.step()
        return reweighter

    with pytest.raises(ValueError, match=r"Adam has made no step with '0\.weight' yet.*warmup_steps=1"):
        run(0)
    assert run(1).table()["step"].to_pylist() == [2] * 5


def test_held_out_data_that_say_nothing() -> None:
    model = net()
    with pytest.raises(RuntimeError, match=r"call fit\(\) before scoring"):
        assay.score([batch(3, 0)], [InRunInfluence(model, TASK, {"t": [batch(3, 1)]})])
    with pytest.raises(ValueError, match="target 't' has no samples"):
        InRunInfluence(model, TASK, {"t": []}).fit()
    nan = torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="target 't' has no samples with a loss"):
        InRunInfluence(model, TASK, {"t": [nan]}).fit()
    with torch.no_grad():
        model[3].weight.zero_()
    with pytest.raises(ValueError, match="gradient of target 't' has length 0 over 3 samples"):
        InRunInfluence(model, TASK, {"t": [batch(3, 1)]}, layers="0").fit()


def test_a_generator_ends_in_an_error_and_not_in_old_gradients() -> None:
    model = net()
    reweighter = Reweighter(model, InRunInfluence(model, TASK, {"t": (batch(3, i) for i in range(2))}))
    for step in range(2):
        data = batch(5, step)
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
        if step == 0:
            reweighter.backward(losses)
        else:
            with pytest.raises(ValueError, match="rather than a generator"):
                reweighter.backward(losses)
