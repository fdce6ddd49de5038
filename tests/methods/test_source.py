"""SOURCE: its closed form with dense matrices, its limits, and the derivative of a training that it approximates."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import assay
from assay.methods import EKFAC, SOURCE, AdamState, TracIn
from assay.methods.eigenbases import Bases, Basis
from assay.methods.krylov import functions_of
from assay.methods.sums import Total
from assay.methods.unrolling import Eigenbasis
from assay.retrain import SGD, Adam, Training, magic
from assay.retrain.magic_training import running
from assay.tasks import Classification, Contrastive, Regression
from tests.methods.data import noisy_digits
from tests.methods.small_problem import gradients, run
from tests.methods.test_ekfac_cg import gauss_newton

RATES = [0.5, 2.0, 1.0, 0.3]


@pytest.fixture
def checkpoints() -> tuple[list[nn.Module], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Four of one small network in float64, a pool and a target."""
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    models = [first]
    for _ in RATES[1:]:
        models.append(copy.deepcopy(models[-1]))
        for p in models[-1].parameters():
            p.data += 0.2 * torch.randn_like(p)
    x, y = torch.randn(43, 5, dtype=torch.float64), torch.randint(3, (43,))
    return models, (x[3:], y[3:]), (x[:3], y[:3])


def states(models: list[nn.Module]) -> list[AdamState]:
    generator = torch.Generator().manual_seed(1)
    moments = [{n: torch.rand(p.shape, generator=generator).double() for n, p in m.named_parameters()} for m in models]
    return [AdamState(v, v, steps=10 * (k + 1)) for k, v in enumerate(moments)]


def flat(vectors: Any, model: nn.Module) -> Tensor:
    return torch.cat([vectors[name].flatten() for name, _ in model.named_parameters()])


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("adam", [False, True])
def test_it_is_the_closed_form_with_dense_matrices(checkpoints: Any, segments: int, adam: bool) -> None:
    models, pool, target = checkpoints
    given = states(models) if adam else None
    method = SOURCE(
        models, Classification(), {"t": [target]}, RATES, segments=segments, optimizers=given, iterations=60
    )
    got = run(method, pool)["source"]
    q, want, own = gradients(models[-1], *target).mean(0), torch.zeros(40).double(), 4 // segments
    for places in reversed([range(i, i + own) for i in range(0, 4, own)]):
        matrix, rate = sum(gauss_newton(models[k], pool[0]) for k in places) / own, sum(RATES[k] for k in places)
        steps = torch.ones(len(matrix)).double()
        if given is not None:
            roots = [(flat(given[k].second, models[k]) / (1 - 0.999 ** given[k].steps)).sqrt() for k in places]
            steps = torch.stack([1 / (root + 1e-8) for root in roots]).mean(0)
        # ∫₀ᵃ e^(−tPH)P dt, where H may be singular: a block of the exponential of a larger matrix
        size = len(matrix)
        both = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
        both[:size, :size], both[:size, size:] = -rate * steps[:, None] * matrix, rate * torch.diag(steps)
        whole = torch.matrix_exp(both)
        mean = sum(gradients(models[k], *pool) for k in places) / own
        want += mean @ whole[:size, size:].T @ q
        q = whole[:size, :size].T @ q
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))
    facts = method.metadata()
    assert float(facts["remainder"]) < 1e-3
    assert "warning" not in facts


def test_a_basis_is_unrolled_as_its_dense_matrix() -> None:
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (3, 4))
    basis = Basis(left, right, torch.rand(3, 4, dtype=torch.float64))
    basis.values[0, 0] = 0
    rotation = torch.kron(left, right)
    matrix, q = rotation @ torch.diag(basis.values.flatten()) @ rotation.T, torch.randn(3, 4, dtype=torch.float64)
    found = Eigenbasis(1.7, Bases({"w": basis, "unused": Basis(None, None)})).unrolled([{"w": q, "unused": q}])
    both = torch.zeros(24, 24, dtype=torch.float64)
    both[:12, :12], both[:12, 12:] = -1.7 * matrix, 1.7 * torch.eye(12)
    whole = torch.matrix_exp(both)
    torch.testing.assert_close(found.before[0]["w"].flatten(), whole[:12, :12] @ q.flatten())
    torch.testing.assert_close(found.integrated[0]["w"].flatten(), whole[:12, 12:] @ q.flatten())
    torch.testing.assert_close(found.integrated[0]["unused"], 1.7 * q)
    torch.testing.assert_close(found.before[0]["unused"], q)


def test_krylov_spaces_give_functions_of_a_matrix_and_say_how_far_they_are() -> None:
    torch.manual_seed(0)
    root = torch.randn(30, 20, dtype=torch.float64)
    matrix, q = root @ root.T / 30, torch.randn(30, dtype=torch.float64)

    def found(iterations: int) -> tuple[Tensor, float, int]:
        functions = [lambda values: torch.exp(-3 * values)]
        vectors, change, made = functions_of(
            lambda vs: [{"a": matrix @ v["a"]} for v in vs], [{"a": q}, {"a": 0 * q}], functions, iterations
        )
        assert not vectors[0][1]["a"].any()
        return vectors[0][0]["a"], change, made

    want = torch.matrix_exp(-3 * matrix) @ q
    got, change, made = found(25)
    assert made < 25
    assert float((got - want).norm() / want.norm()) < change < 1e-3
    assert found(2)[1] > 1e-2


@pytest.mark.parametrize("curvature", ["gauss_newton", "ekfac"])
def test_little_training_is_tracins_and_much_is_the_inverse(checkpoints: Any, curvature: Any) -> None:
    models, pool, target = checkpoints
    task, targets = Classification(), {"t": [target]}
    little = run(SOURCE(models[-1:], task, targets, [1e-6], curvature=curvature), pool)["source"]
    torch.testing.assert_close(
        little, run(TracIn(models[-1:], task, targets, [1e-6]), pool)["tracin"], rtol=1e-4, atol=1e-9
    )
    if curvature == "ekfac":
        much = run(SOURCE(models[-1:], task, targets, [1e9], curvature=curvature), pool)["source"]
        want = run(EKFAC(models[-1], task, targets, damping=1e-9), pool)["ekfac"]
        # Λ is scaled to the Gauss–Newton matrix' trace, by a few per cent with these samples.
        assert 0.7 < float(much @ want / (want @ want)) < 1.4
        assert float(torch.corrcoef(torch.stack([much, want]))[0, 1]) > 0.999999


def test_a_segment_for_every_step_is_the_derivative_of_the_training() -> None:
    """Of a linear model the Gauss–Newton matrix is the Hessian, and small steps are about the flow that is unrolled."""
    torch.manual_seed(0)
    x, y, steps, rate = torch.randn(30, 4, dtype=torch.float64), torch.randint(3, (30,)), 12, 0.1
    training = Training(
        nn.Linear(4, 3).double(), Classification(), (x, y), [np.arange(30)] * steps, SGD([rate] * steps)
    )
    targets = {"t": [(x[:2], y[:2])]}
    want, models = magic(training, targets, directions=0).scores[:, 0], []
    with running():
        state = training.initial()
        for step in range(steps):
            models.append(loaded(nn.Linear(4, 3).double(), training, state))
            state = training.advance(state, step, training.weights(None))
    got = run(SOURCE(models, Classification(), targets, [rate] * steps, segments=steps), (x, y))["source"] / 30
    assert float((got - want).norm() / want.norm()) < 0.05
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.999
    plain = run(TracIn(models, Classification(), targets, [rate] * steps), (x, y))["tracin"] / 30
    assert float((plain - want).norm() / want.norm()) > 0.15  # what forgetting costs


def loaded(model: nn.Module, training: Training, state: Any) -> nn.Module:
    model.load_state_dict({name: p.clone() for name, p in training.named(state[0]).items()})
    return model


@pytest.mark.parametrize("kind", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_on_digits_it_ranks_much_more_as_the_derivative_does_than_gradients_do(kind: str) -> None:
    world, steps, size = noisy_digits(0.0, size=154), 60, 150
    x, y = (world.x / 4, world.given)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    shape = [min((t + 1) / 15, (steps - t) / 45) for t in range(steps)]
    rng, batches = np.random.default_rng(0), []
    while len(batches) < steps:
        batches += list(rng.permutation(size).reshape(-1, 25))
    sgd = kind == "sgd"
    optimizer = (
        SGD([0.1 * s for s in shape], momentum=0.9)
        if sgd
        else Adam([0.01 * s for s in shape], (0.9, 0.99), eps_root=1e-12)
    )
    training = Training(make(), Classification(), (x[:size], y[:size]), batches, optimizer)
    targets = {f"t{i}": [(x[i : i + 1], y[i : i + 1])] for i in range(size, size + 4)}
    truth = magic(training, targets, directions=0).scores.numpy()
    models, optimizers = [], []
    with running():
        state = training.initial()
        for step in range(steps):
            state = training.advance(state, step, training.weights(None))
            if step % 10 == 9:
                models.append(loaded(make(), training, state))
                if not sgd:
                    first, second = (training.named(part) for part in state[1:])
                    optimizers.append(AdamState(first, second, (0.9, 0.99), steps=step + 1))
    rates = [sum(training.rates[k : k + 10]) / (0.1 if sgd else 1) for k in range(0, steps, 10)]

    def agreement(method: Any) -> float:
        table = assay.score([(x[:size], y[:size])], [method.fit([(x[:size], y[:size])])])
        columns = [table[f"{method.name}_{target}"].to_numpy() for target in targets]
        return float(np.mean([spearmanr(column, truth[:, i])[0] for i, column in enumerate(columns)]))

    source = agreement(SOURCE(models, Classification(), targets, rates, optimizers=optimizers or None))
    ekfac = agreement(
        SOURCE(models, Classification(), targets, rates, optimizers=optimizers or None, curvature="ekfac")
    )
    tracin, dot = (agreement(TracIn(models[k:], Classification(), targets, rates[k:])) for k in (0, -1))
    assert source > max(dot, tracin) + 0.15
    assert ekfac > dot


def test_it_takes_losses_without_labels(checkpoints: Any) -> None:
    models, (x, _), (aim, _) = checkpoints
    y = torch.randn(40, 3, dtype=torch.float64)
    got = run(SOURCE(models, Regression(), {"t": [(aim, y[:3])]}, RATES), (x, y))["source"]
    assert bool(got.isfinite().all())
    with pytest.raises(ValueError, match="Regression has no distribution of labels to draw from"):
        SOURCE(models, Regression(), {"t": [(aim, y[:3])]}, RATES, curvature="ekfac").fit([(x, y)])


def test_every_checkpoint_draws_labels_of_its_own(checkpoints: Any) -> None:
    """Gradients of drawn labels are 0 in expectation: the mean over many equal checkpoints is nearer to it."""
    models, (x, y), target = checkpoints
    method, sums = TracIn(models[:1] * 16, Classification(), {"t": [target]}, [1.0] * 16), []
    for k in range(16):
        whole, parts = Total(method.parameters), Total(method.parameters)
        method._run(k, whole, [(x, y)], drawn=True)
        method._run(k, parts, list(zip(x.split(7), y.split(7), strict=True)), drawn=True)
        sums.append(flat(whole.sums, models[0]))
        torch.testing.assert_close(flat(parts.sums, models[0]), sums[-1])
    lengths = torch.stack([own.norm() for own in sums])
    assert float(torch.stack(sums).mean(0).norm()) < 0.5 * float(lengths.mean())


def test_a_target_that_is_all_but_certain_spoils_no_other() -> None:
    """Its gradient is 1e-41 long, and the inverse of that is beyond float32."""
    model = nn.Linear(1, 2, bias=False)
    model.weight.data = torch.tensor([[46.0], [-46.0]])
    sure, unsure = (torch.ones(1, 1), torch.tensor([0])), (0.01 * torch.ones(1, 1), torch.tensor([0]))
    pool = 0.1 * torch.arange(4.0)[:, None], torch.tensor([0, 0, 1, 1])
    both = run(SOURCE([model], Classification(), {"sure": [sure], "unsure": [unsure]}, [1.0]), pool)
    alone = run(SOURCE([model], Classification(), {"t": [unsure]}, [1.0]), pool)
    assert 0 < float(both["source_sure"].abs().max()) < 1e-38
    torch.testing.assert_close(both["source_unsure"], alone["source"])


@pytest.mark.parametrize("curvature", ["gauss_newton", "ekfac"])
def test_a_broken_sample_is_counted_once_and_not_at_every_checkpoint(checkpoints: Any, curvature: Any) -> None:
    models, (x, y), target = checkpoints
    broken = x.index_fill(0, torch.tensor([3]), torch.inf), y
    method = SOURCE(models, Classification(), {"t": [target]}, RATES, curvature=curvature).fit([broken])
    assert method.metadata()["left_out"] == "1"


def test_what_it_cannot_be_made_of_is_refused(checkpoints: Any, caplog: pytest.LogCaptureFixture) -> None:
    models, pool, target = checkpoints
    task, targets = Classification(), {"t": [target]}
    with pytest.raises(ValueError, match="source: segments: expected 1 to 4, the number of checkpoints, got 5"):
        SOURCE(models, task, targets, RATES, segments=5)
    with pytest.raises(ValueError, match="iterations: expected a finite number of at least 1, got 0"):
        SOURCE(models, task, targets, RATES, iterations=0)
    with pytest.raises(ValueError, match="source: expected one optimiser state per checkpoint, 4, got 1"):
        SOURCE(models, task, targets, RATES, optimizers=states(models)[:1])
    for curvature in ("gauss_newton", "ekfac"):
        with pytest.raises(ValueError, match=r"source: the pool that fit\(\) was given has no samples"):
            SOURCE(models, task, targets, RATES, curvature=curvature).fit([])
    unknown = [AdamState(state.first, state.second) for state in states(models)]
    with pytest.raises(ValueError, match="source: the optimiser's state at checkpoint 0 does not say how many steps"):
        SOURCE(models, task, targets, RATES, optimizers=unknown)
    with caplog.at_level(logging.WARNING, "assay"):
        method = SOURCE(models, task, targets, [100 * rate for rate in RATES], iterations=1).fit([pool])
    assert "the last of 1 products still changed a direction by" in caplog.text
    assert method.metadata()["warning"] == "not settled; give more iterations"


def test_losses_that_are_not_made_of_the_logits_alone_have_no_curvature() -> None:
    """A contrastive loss is half of its columns, and its logits are the rows."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, images: Tensor, texts: Tensor) -> Any:
            return self.image(images), self.text(texts), 1.0

    batch = (torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="Contrastive: its losses are not made of its logits or predictions alone"):
        SOURCE([Towers()], Contrastive(), {"a": [batch]}, [1.0]).fit([batch])
