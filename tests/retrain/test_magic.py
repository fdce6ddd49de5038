"""MAGIC: its derivatives are those of the whole unrolled run, and of real retrainings with other weights."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from assay.retrain import SGD, Adam, Training, magic, metasmoothness, optimizer_of

N, STEPS, BATCH = 12, 8, 4
RATES = [0.02 + 0.01 * t for t in range(STEPS)]
OPTIMIZERS: dict[str, Any] = {
    "sgd": SGD(RATES, weight_decay=0.1),
    "momentum": SGD(RATES, momentum=0.9, dampening=0.2, weight_decay=0.05),
    "nesterov": SGD(RATES, momentum=0.8, nesterov=True),
    "sgdw": SGD(0.1, momentum=0.9, weight_decay=0.3, decoupled_weight_decay=True, undecayed=["*.bias"]),
    "adam": Adam(RATES, betas=(0.8, 0.95), eps_root=1e-6, weight_decay=0.1),
    "adam, no eps_root": Adam(RATES, eps_root=0),
    "adamw": Adam(RATES, eps_root=1e-8, weight_decay=0.5, decoupled_weight_decay=True, undecayed=["2.*"]),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def losses(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def world(optimizer: Any, **options: Any) -> tuple[Training, dict[str, list[Any]], Tensor]:
    """A run in whose batches samples come back, one of them twice in a batch; its targets; weights other than 1."""
    rng = np.random.default_rng(1)
    x, y = torch.from_numpy(rng.normal(size=(N + 6, 3))), torch.from_numpy(rng.integers(2, size=N + 6))
    batches = [rng.integers(N - 1, size=BATCH) for _ in range(STEPS)]
    batches[2][1] = batches[2][0]
    batches[5] = batches[5][:3]
    targets = {"a": [(x[N : N + 1], y[N : N + 1])], "b": [(x[N + 1 : N + 3], y[N + 1 : N + 3]), (x[-1:], y[-1:])]}
    training = Training(network(), losses, (x[:N], y[:N]), batches, optimizer, **options)
    return training, targets, torch.from_numpy(rng.uniform(0.5, 1.5, size=N))


def unrolled(training: Training, targets: dict[str, list[Any]], weights: Tensor) -> Tensor:
    """Autograd through the whole run, each parameter on its own, formulas as in torch's documentation -> (N, K)."""
    o, w = training.optimizer, weights.clone().requires_grad_()
    theta = {name: p.detach().clone().requires_grad_() for name, p in training.model.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in theta.items()} for _ in range(2))
    x, y = training.data
    for t, rows in enumerate(training.rows):
        lr = o.lr if isinstance(o.lr, float) else o.lr[t]
        each = nn.functional.cross_entropy(
            functional_call(training.model, theta, (x[rows],)), y[rows], reduction="none"
        )
        total = (w[rows] * each).sum() / len(rows)
        grads = dict(zip(theta, torch.autograd.grad(total, list(theta.values()), create_graph=True), strict=True))
        if training.clip:
            norm = torch.cat([g.flatten() for g in grads.values()]).norm()
            grads = {n: g * min(1.0, training.clip / (norm + 1e-6)) for n, g in grads.items()}
        for name, p in theta.items():
            spared = any(name == g or (g == "*.bias" and name.endswith(".bias")) for g in o.undecayed)
            spared |= "2.*" in o.undecayed and name.startswith("2.")
            decay, g = 0.0 if spared else o.weight_decay, grads[name]
            if o.decoupled_weight_decay:
                p = p - lr * decay * p
            else:
                g = g + decay * p
            if isinstance(o, SGD):
                m[name] = (g if t == 0 else o.momentum * m[name] + (1 - o.dampening) * g) if o.momentum else g
                theta[name] = p - lr * (g + o.momentum * m[name] if o.nesterov else m[name])
            else:
                m[name] = o.betas[0] * m[name] + (1 - o.betas[0]) * g
                v[name] = o.betas[1] * v[name] + (1 - o.betas[1]) * g**2
                hat = m[name] / (1 - o.betas[0] ** (t + 1)), v[name] / (1 - o.betas[1] ** (t + 1))
                theta[name] = p - lr * hat[0] / ((hat[1] + o.eps_root).sqrt() + o.eps)
    found = []
    for batches in targets.values():
        each = torch.cat(
            [
                nn.functional.cross_entropy(functional_call(training.model, theta, (a,)), b, reduction="none")
                for a, b in batches
            ]
        )
        found.append(torch.autograd.grad(each.mean(), w, retain_graph=True)[0])
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"clip": 0.4, "rows_at_once": 3}], ids=["plain", "clipped, in parts"])
def test_it_is_autograd_through_the_whole_run(name: str, options: dict[str, Any]) -> None:
    training, targets, weights = world(OPTIMIZERS[name], **options)
    found = magic(training, targets, weights=weights, checkpoints=2, directions=0)
    expected = -unrolled(training, targets, weights)
    seen = ~found.scores.isnan().any(1)
    assert seen.tolist() == [any(i in rows for rows in training.rows) for i in range(N)]
    assert not seen[N - 1]
    np.testing.assert_allclose(found.scores[seen], expected[seen], rtol=1e-9, atol=1e-13)
    assert float(expected[seen].abs().max()) > 1e-3


def test_the_loop_makes_the_steps_of_torch() -> None:
    """The trained parameters of torch's own optimisers, to the last digits of float64."""
    of_torch = {
        "sgd": lambda p, d: torch.optim.SGD(p, weight_decay=0.1),
        "momentum": lambda p, d: torch.optim.SGD(p, momentum=0.9, dampening=0.2, weight_decay=0.05),
        "nesterov": lambda p, d: torch.optim.SGD(p, momentum=0.8, nesterov=True),
        "adam, no eps_root": lambda p, d: torch.optim.Adam(p),
        "adamw": lambda p, d: torch.optim.AdamW([{"params": p, "weight_decay": 0.5}, {"params": d, "weight_decay": 0}]),
    }
    for name, make in of_torch.items():
        training, _, _ = world(OPTIMIZERS[name], clip=0.7)
        model = copy.deepcopy(training.model)
        spared = [p for n, p in model.named_parameters() if name == "adamw" and n.startswith("2.")]
        optimizer = make([p for p in model.parameters() if all(p is not s for s in spared)], spared)
        training = replace(training, optimizer=optimizer_of(optimizer, model, RATES))
        if name != "adamw":
            assert training.optimizer == replace(OPTIMIZERS[name], undecayed=[])
        x, y = training.data
        for step, rows in enumerate(training.rows):
            for group in optimizer.param_groups:
                group["lr"] = RATES[step]
            optimizer.zero_grad()
            losses(model, (x[rows], y[rows])).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.7)
            optimizer.step()
        found = training.train()
        for n, p in model.named_parameters():
            np.testing.assert_allclose(found[n], p.detach(), rtol=1e-13, atol=1e-15, err_msg=f"{name}: {n}")


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_it_is_what_retraining_with_other_weights_does(name: str) -> None:
    training, targets, weights = world(OPTIMIZERS[name])
    found = magic(training, {"b": targets["b"]}, weights=weights, directions=0)

    def after(w: Tensor) -> float:
        model = training.model
        each = [functional_losses(model, training.train(w), batch) for batch in targets["b"]]
        return float(torch.cat(each).mean())

    assert float(found.losses[0]) == pytest.approx(after(weights), rel=1e-14)
    for i in (0, 3, 5):
        h = 1e-5 * torch.eye(N, dtype=torch.float64)[i]
        slope = (after(weights + h) - after(weights - h)) / 2e-5
        assert float(found.scores[i, 0]) == pytest.approx(-slope, rel=1e-6, abs=1e-10)


def functional_losses(model: nn.Module, parameters: dict[str, Tensor], batch: Any) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="none")


def test_the_number_of_checkpoints_changes_no_bit() -> None:
    training, targets, weights = world(OPTIMIZERS["adamw"])
    runs = [magic(training, targets, weights=weights, checkpoints=c, directions=0) for c in (1, 2, STEPS, 50)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.scores, runs[0].scores)
    one = magic(training, {"b": targets["b"]}, weights=weights, directions=0)
    np.testing.assert_array_equal(one.scores[:, 0], runs[0].scores[:, 1])


def test_one_step_is_the_first_order_score() -> None:
    """−∂L/∂w_i = η⟨∇L(θ₁), ∇ℓ_i(θ₀)⟩ / B for plain SGD."""
    training, targets, _ = world(SGD(0.3))
    training = replace(training, batches=[[0, 4, 7]])
    found = magic(training, targets, directions=0)
    x, y = training.data
    theta = training.train()

    def gradient(parameters: dict[str, Tensor], batch: Any) -> Tensor:
        leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        total = functional_losses(training.model, leaves, batch).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(leaves.values()))])

    start = dict(training.model.named_parameters())
    for i in (0, 4, 7):
        own = gradient(start, (x[i : i + 1], y[i : i + 1]))
        assert float(found.scores[i, 0]) == pytest.approx(
            0.1 * float(own @ gradient(theta, targets["a"][0])), rel=1e-12
        )


def test_dead_inputs_without_eps_root_have_the_limit_of_small_ones() -> None:
    """An input that is always 0 has v = 0 for ever; the scores are finite, and those of a vanishing eps_root."""
    training, targets, _ = world(Adam(0.05, eps_root=0))
    x, y = training.data
    training = replace(training, data=(x * torch.tensor([1.0, 0.0, 1.0]), y))
    found = magic(training, targets, directions=1)
    limit = magic(replace(training, optimizer=Adam(0.05, eps_root=1e-22)), targets, directions=0)
    np.testing.assert_allclose(found.scores, limit.scores, rtol=1e-5, atol=1e-9)
    assert bool(found.scores[:2].isfinite().all())
    assert any("eps_root=0" in warning for warning in found.warnings)


def test_masks_of_dropout_are_part_of_the_run() -> None:
    training, targets, weights = world(SGD(0.2))
    model = nn.Sequential(nn.Dropout(0.3), *training.model)
    with pytest.raises(ValueError, match=r"dropout in train mode \(0\).*dropout_seed"):
        magic(replace(training, model=model), targets)
    seeded = replace(training, model=model, dropout_seed=3)
    before = torch.random.get_rng_state()
    found = magic(seeded, targets, weights=weights, checkpoints=2, directions=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    h = 1e-5 * torch.eye(N, dtype=torch.float64)[3]
    ends = [
        float(functional_losses(model.eval(), t, targets["a"][0]).mean())
        for t in (_train_mode(seeded, weights + h), _train_mode(seeded, weights - h))
    ]
    assert float(found.scores[3, 0]) == pytest.approx(-(ends[0] - ends[1]) / 2e-5, rel=1e-5)
    other = magic(replace(seeded, model=model.train(), dropout_seed=4), targets, directions=0)
    assert float((other.scores - found.scores).abs().nan_to_num().max()) > 1e-4


def _train_mode(training: Training, weights: Tensor) -> dict[str, Tensor]:
    training.model.train()
    return training.train(weights)


def test_metasmoothness_is_the_papers() -> None:
    training, _, weights = world(OPTIMIZERS["momentum"])
    found = metasmoothness(training, weights, directions=2, width=0.2, seed=5)
    generator = torch.Generator().manual_seed(5)
    for value in found.tolist():
        v = torch.randn(N, generator=generator, dtype=torch.float64)
        zero, one, two = (
            torch.cat([p.flatten() for p in training.train(weights + k * 0.2 * v).values()]) for k in (0, 1, 2)
        )
        shares = (two - zero).abs() / (two - zero).abs().sum()
        assert value == pytest.approx(float((shares * (one - zero).sign() * (two - one).sign()).sum()), abs=1e-12)
    assert float(found.min()) > 0.9


@pytest.mark.parametrize("seed", [0, 5])
def test_what_scores_miss_is_told_by_runs_with_other_weights(seed: int) -> None:
    training, targets, weights = world(OPTIMIZERS["adam"])
    found = magic(training, targets, weights=weights, directions=2, seed=seed)
    generator, gaps, changes = torch.Generator().manual_seed(seed), [], []
    scores, start = found.scores.nan_to_num(), target_losses(training.train(weights), targets)
    for _ in range(2):
        v = 0.1 * torch.randn(N, generator=generator, dtype=torch.float64)
        near, far = (target_losses(training.train(weights + k * v), targets) - start for k in (1, 2))
        changes.append(2 * near - far / 2)
        gaps.append(changes[-1] + v @ scores)
    assert found.missed == pytest.approx(float(torch.stack(gaps).norm() / torch.stack(changes).norm()), rel=1e-9)
    assert 0 < found.missed < 0.1
    assert np.isnan(magic(training, targets, directions=0).missed)


def target_losses(theta: dict[str, Tensor], targets: dict[str, list[Any]]) -> Tensor:
    with torch.no_grad():
        return torch.stack(
            [
                torch.cat([losses(lambda x: functional_call(network(), theta, x), batch) for batch in batches]).mean()
                for batches in targets.values()
            ]
        )


def test_signs_that_turn_are_missed_and_a_larger_eps_root_tells_them() -> None:
    """Two samples' gradients all but cancel, so that Adam's first step turns with their weights."""
    x = torch.tensor([[1.0, 0.2], [1.0, -0.3]]).double().repeat(8, 1)
    y = torch.arange(2).repeat(8)
    model = nn.Linear(2, 2).double()
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    targets = {"target": [(torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0]))]}
    shares, warned = {}, {}
    for eps_root in (1e-12, 1e-3):
        training = Training(model, losses, (x, y), [np.arange(16)] * 2, Adam(0.05, eps_root=eps_root))
        found = magic(training, targets, directions=4)
        shares[eps_root], warned[eps_root] = found.missed, "the scores miss" in " ".join(found.warnings)
    assert shares[1e-12] > 0.9
    assert shares[1e-3] < 0.15
    assert warned == {1e-12: True, 1e-3: False}


def test_a_rough_run_is_called_rough() -> None:
    """A rate far beyond what is stable: the trained model jumps about with the weights, and the result says so."""
    training, targets, _ = world(SGD(30.0))
    training = replace(training, batches=[np.arange(8) for _ in range(15)])
    found = magic(training, targets, directions=1)
    assert float(found.metasmoothness.mean()) < 0.9
    assert any("metasmoothness is" in warning for warning in found.warnings)
    calm, _, _ = world(SGD(0.1))
    assert not magic(calm, targets, directions=2).warnings


def test_a_layer_with_two_names_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    before, data = list(model.parameters()), (torch.randn(6, 3).double(), torch.arange(6) % 3)
    magic(Training(model, losses, data, [[0, 1, 2], [3, 4, 5]], SGD(0.1)), {"a": [data]}, directions=0)
    assert list(map(id, model.parameters())) == list(map(id, before))
