"""EK-FAC: exact where the curvature factors, and what it leaves out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.methods import EKFAC, GradientCosine, Scorer
from assay.methods.eigenbases import _of_gradients
from assay.methods.second_moments import damping_units
from assay.tasks import CausalLM, Classification
from tests.methods.small_problem import POOL, gradients, run, split


def test_ekfac_of_a_layer_whose_curvature_factors_is_exact() -> None:
    """Inputs and output gradients independent by construction: EK-FAC's Λ in its basis is then the whole E[g gᵀ]."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    x, y = torch.randn(400, 3), torch.randint(4, (400,))
    method = EKFAC(
        model, Classification(), {"t": [(x[:5], y[:5])]}, self_influence=True, true_fisher=False, damping=0.1
    )
    got = run(method, (x, y))
    phi = gradients(model, x, y)
    basis = method._bases["weight"]
    rotation = torch.kron(basis.left.double(), basis.right.double())  # row-major: gradient (O, I)
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(12).double(), rtol=0, atol=1e-5)
    values = (phi @ rotation).square().mean(0)
    inverse = rotation @ torch.diag(1 / (values + 0.1 * values.mean())) @ rotation.T
    torch.testing.assert_close(got["ekfac"], phi @ inverse @ phi[:5].mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got["ekfac_self"], ((phi @ inverse) * phi).sum(1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", [2, 5])
def test_shampoos_eigenvectors_are_those_of_whole_gradients(positions: int) -> None:
    """On either side of the choice between Gram matrices over positions and gradients multiplied out (5² > 3 · 4)."""
    torch.manual_seed(0)
    x, y = torch.randn(30, positions, 4, dtype=torch.float64), torch.randn(30, positions, 3, dtype=torch.float64)
    whole = torch.einsum("bto,bti->boi", y, x)
    left, right = _of_gradients(y, x)
    torch.testing.assert_close(left, torch.einsum("boi,bpi->op", whole, whole))
    torch.testing.assert_close(right, torch.einsum("boi,boj->ij", whole, whole))


def test_shampoo_damps_as_ekfac_in_a_basis_of_its_own(problem) -> None:
    models, pool, target = problem
    model = models[0].double()
    pool, target = (pool[0].double(), pool[1]), (target[0].double(), target[1])
    method = EKFAC(model, Classification(), {"t": [target]}, basis="shampoo", true_fisher=False)
    got = run(method, pool)["ekfac"]
    phi, aim = (
        torch.cat([weight, bias[:, :, None]], 2)
        for weight, bias, *_ in (split(model, gradients(model, *data)) for data in (pool, target))
    )
    basis, rotation = method._bases["0.weight"], torch.linalg.eigh(torch.einsum("boi,bpi->op", phi, phi)).eigenvectors
    torch.testing.assert_close((basis.left.T @ rotation).abs(), torch.eye(5).double(), rtol=0, atol=1e-6)
    values = (basis.left.T @ phi @ basis.right).square().mean(0)
    want = basis.left @ ((basis.left.T @ aim.mean(0) @ basis.right) / (values + 0.1 * values.mean())) @ basis.right.T
    torch.testing.assert_close(method._directions["t"]["0.weight"], want[:, :-1])
    torch.testing.assert_close(method._directions["t"]["0.bias"], want[:, -1])
    assert not torch.allclose(
        got, run(EKFAC(model, Classification(), {"t": [target]}, true_fisher=False), pool)["ekfac"]
    )
    with pytest.raises(ValueError, match="basis 'soap'; expected 'kfac' or 'shampoo'"):
        EKFAC(model, Classification(), {"t": [target]}, basis="soap")


class WithOne(nn.Module):
    """A layer's bias as the weight of an input that is always 1, in a layer without bias."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1] + 1, len(weight), bias=False)
        self.layer.weight.data = torch.cat([weight, bias[:, None]], 1).detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([x, torch.ones_like(x[..., :1])], -1))


class Windows(nn.Module):
    """An image's 2 × 2 windows, (B, 1, 4, 4) -> (B, 9, 4)."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.unfold(x, 2).mT


class Channels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT.flatten(1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def with_biases(kind: str) -> tuple[nn.Module, nn.Module]:
    """A model, and the same without biases."""
    first, last = nn.Linear(4, 4), nn.Linear(36 if kind == "conv" else 4, 3)
    if kind == "conv":
        conv = nn.Conv2d(1, 4, 2)
        plain = nn.Sequential(conv, nn.Flatten(), nn.Tanh(), last)
        own = [Windows(), WithOne(conv.weight.flatten(1), conv.bias), Channels(), nn.Tanh()]
        return plain, nn.Sequential(*own, WithOne(last.weight, last.bias))
    own = [WithOne(first.weight, first.bias), nn.Tanh(), Mean()]
    if kind == "conv1d":
        transposed = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 4)
        transposed.weight.data, transposed.bias.data = first.weight.data.T.clone(), first.bias.data
        first = transposed
    return nn.Sequential(first, nn.Tanh(), Mean(), last), nn.Sequential(*own, WithOne(last.weight, last.bias))


@pytest.mark.parametrize("basis", ["kfac", "shampoo"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv"])
def test_a_bias_is_the_weight_of_an_input_that_is_always_1(kind: str, basis: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, *((1, 4, 4) if kind == "conv" else (5, 4))).relu(), torch.randint(3, (40,))
    x[3] = 0  # a sample without inputs still moves biases
    target = {"t": [(x[:5], y[:5])]}
    plain, wide = (
        run(EKFAC(model, Classification(), target, self_influence=True, basis=basis), (x, y))
        for model in with_biases(kind)
    )
    for column in ("ekfac", "ekfac_self"):
        torch.testing.assert_close(plain[column], wide[column], rtol=1e-4, atol=1e-5)


def test_a_bias_that_is_not_only_its_layers_is_apart() -> None:
    """It is the bias of another layer too: its gradient is not the sum of the weight's output gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randint(4, (40,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    method = EKFAC(model, Classification(), {"t": [(x[:5], y[:5])]}, self_influence=True).fit([(x, y)])
    assert {name: basis.values.shape for name, basis in method._bases.items()} == {
        "0.weight": (4, 4), "0.bias": (4,), "2.weight": (4, 4)
    }  # fmt: skip


def test_ekfac_of_a_float64_model_is_float64() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).double()
    x, y = torch.randn(50, 3).double() + 100, torch.randint(4, (50,))  # float32 moments lose the spread about the mean
    method = EKFAC(model, Classification(), {"t": [(x[:5], y[:5])]}, true_fisher=False).fit([(x, y)])
    phi = gradients(model, x, y).view(50, 4, 3)
    basis = method._bases["weight"]
    rotated = basis.left.T @ phi @ basis.right
    mean = rotated.square().mean(0)
    torch.testing.assert_close(basis.right.T @ x.T @ x @ basis.right, torch.diag(torch.linalg.eigvalsh(x.T @ x)))
    torch.testing.assert_close(basis.values, mean + 0.1 * mean.mean(), rtol=1e-9, atol=0)
    want = basis.left @ (rotated[:5].mean(0) / (mean + 0.1 * mean.mean())) @ basis.right.T
    torch.testing.assert_close(method._directions["t"]["weight"], want, rtol=1e-9, atol=1e-12)


def test_ekfac_with_an_absolute_damping(problem) -> None:
    models, (x, y), target = problem
    method = EKFAC(
        models[0], Classification(), {"t": [target]}, damping=1e-3, absolute_damping=True, true_fisher=False
    ).fit([(x, y)])
    assert method.metadata()["damping"] == "0.001 absolute"
    phi = gradients(models[0], x, y)
    # The trace of E[g gᵀ] over the last layer's weight and bias, in any basis.
    values, own = method._bases["2.weight"].values, torch.cat([phi[:, -18:-3].view(-1, 3, 5), phi[:, -3:, None]], 2)
    assert values.shape == (3, 6)
    torch.testing.assert_close(values.double().sum(), own.square().mean(0).sum() + 18e-3, rtol=1e-5, atol=1e-7)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping: expected a finite number of at least 0, got"):
            EKFAC(models[0], Classification(), {"t": [target]}, damping=wrong)


def test_a_target_named_self_needs_another_name_beside_self_influence(problem) -> None:
    models, _, target = problem
    targets = {"self": [target], "b": [target]}
    with pytest.raises(ValueError, match="target 'self' would have self-influence's column, ekfac_self; rename it"):
        EKFAC(models[0], Classification(), targets, self_influence=True)
    alone = EKFAC(models[0], Classification(), {"self": [target]}, self_influence=True)
    assert [column.name for column in alone.columns] == ["ekfac", "ekfac_self"]


def test_noise_is_damped_in_units_of_its_layer() -> None:
    names = ["a.key.weight", "a.key.bias", "b.weight", "b.bias", "c.bias"]
    assert damping_units(names, [1e-6, 1e-19, 2.0, 0.0, 1e-30]) == [1e-6, 1e-10, 2.0, 0.0, 1e-30]
    assert damping_units(["w.weight", "w.bias"], [0.01, 1.0]) == [0.01, 1.0]


def test_ekfac_with_drawn_labels_and_a_bias(problem) -> None:
    models, pool, target = problem
    scores = run(EKFAC(models[0], Classification(), {"a": [target], "b": [target]}), pool)
    torch.testing.assert_close(scores["ekfac_a"], scores["ekfac"])
    assert bool(scores["ekfac"].isfinite().all())


@pytest.mark.parametrize("true_fisher", [True, False])
def test_ekfac_leaves_out_what_is_not_finite(problem, true_fisher: bool) -> None:
    models, (x, y), target = problem
    broken = x.clone()
    broken[7] = torch.inf
    kept = torch.arange(POOL) != 7
    whole, clean = (broken, y), (x[kept], y[kept])

    def scores(pool: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        method = EKFAC(models[0], Classification(), {"t": [target]}, self_influence=True, true_fisher=true_fisher)
        table = assay.score([clean], [method.fit([pool])])
        return {name: torch.tensor(table[name].to_pylist()) for name in ("ekfac", "ekfac_self")}

    got = scores(whole)
    if true_fisher:  # a row's draw follows from its place in the batch
        assert all(bool(score.isfinite().all()) for score in got.values())
        return
    want = scores(clean)
    for name in ("ekfac", "ekfac_self"):
        torch.testing.assert_close(got[name], want[name])
    with pytest.raises(ValueError, match="target 't' has no samples with a finite gradient"):
        EKFAC(models[0], Classification(), {"t": [(broken[7:8], y[7:8])]}, true_fisher=False).fit([(x, y)])


@pytest.mark.parametrize("true_fisher", [True, False])
def test_ekfac_counts_only_samples_with_a_loss(true_fisher: bool) -> None:
    """Texts with nothing to predict change neither the target's mean nor the pool's curvature."""
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), torch.randint(9, (10, 6))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids)

    def batch(rows: slice, silent: int) -> dict[str, Tensor]:
        labels = torch.cat([ids[rows], torch.full((silent, 6), -100)])
        return {"input_ids": torch.cat([ids[rows], ids[:1].expand(silent, -1)]), "labels": labels}

    def scores(silent: int) -> dict[str, Tensor]:
        target = {"t": [batch(slice(4), silent)]}
        method = EKFAC(Model(), CausalLM(), target, self_influence=True, true_fisher=true_fisher)
        return Scorer([method.fit([batch(slice(10), silent)])])(batch(slice(10), 0))

    want, got = scores(0), scores(12)
    if true_fisher:  # more rows draw other labels: about the same curvature
        assert 0.5 < float(got["ekfac_self"].sum() / want["ekfac_self"].sum()) < 2
    else:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want["ekfac"].abs().max()))
    silent, full = [batch(slice(0), 3)], [batch(slice(4), 0)]
    make = lambda target: EKFAC(Model(), CausalLM(), {"t": target}, true_fisher=true_fisher)  # noqa: E731
    with pytest.raises(ValueError, match="target 't' has no samples with a finite gradient: of 3, 0 have a loss"):
        make(silent).fit(full)
    with pytest.raises(ValueError, match=r"the pool .* has no samples with a finite gradient: of 3, 0 have a loss"):
        make(full).fit(silent)
    with pytest.raises(ValueError, match="target 't' has no samples with a finite gradient"):
        GradientCosine(Model(), CausalLM(), {"t": silent}).fit()


def test_ekfac_of_a_pool_without_a_finite_gradient_is_refused_and_leaves_the_last_fit(problem) -> None:
    models, (x, y), target = problem
    method = EKFAC(models[0], Classification(), {"t": [target]}, self_influence=True, true_fisher=False)
    want = run(method, (x, y))
    for pool in ((x * torch.nan, y), (x[:0], y[:0])):
        with pytest.raises(ValueError, match=r"ekfac: the pool that fit\(\) was given has no samples"):
            method.fit([pool])
    linear, large = nn.Linear(6, 3, bias=False), x * 1e30  # a loss, but no square of a gradient
    with pytest.raises(ValueError, match=f"of {POOL}, {POOL} have a loss"):
        EKFAC(linear, Classification(), {"t": [target]}, true_fisher=False).fit([(large, linear(large).argmin(1))])
    copy.copy(method).fit([(x[:20], y[:20])])
    table = assay.score([(x, y)], [method])
    for name, scores in want.items():
        assert table[name].to_pylist() == scores.tolist()


def test_ekfac_of_bare_parameters_has_their_diagonal(problem) -> None:
    _, (x, y), target = problem

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.tensor(2.0))
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale * (x + self.shift).tanh())

    model = Shifted()
    EKFAC(model, Classification(), {"t": [target]}, self_influence=True).fit([(x, y)])
    method = EKFAC(model, Classification(), {"t": [target]}, layers=["shift", "scale"], damping=0.0, true_fisher=False)
    got = run(method, (x, y))["ekfac"]
    own, aim = (gradients(model, *data)[:, :7] for data in ((x, y), target))
    torch.testing.assert_close(got, own @ (aim.mean(0) / own.square().mean(0)), rtol=1e-4, atol=1e-5)


def test_drawn_labels_are_the_same_in_any_batches() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4, bias=False), torch.randn(1, 3).expand(200, 3)
    y = torch.zeros(200, dtype=torch.long)
    batchings = [[200], [1] * 200, [7, 93, 100]]
    whole, single, uneven = (
        EKFAC(model, Classification(), self_influence=True).fit(list(zip(x.split(sizes), y.split(sizes), strict=True)))
        for sizes in batchings
    )
    values = whole._bases["weight"].values
    for other in (single, uneven):
        torch.testing.assert_close(other._bases["weight"].values, values, rtol=1e-4, atol=1e-6)
    # One sample 200 times over: its labels still differ.
    assert int((values > 2 * values.min()).sum()) > 1


def test_ekfac_without_damping_and_without_gradient_is_zero_not_nan() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    x[:, 2] = 0  # a dead pixel
    scores = run(EKFAC(nn.Linear(5, 3), Classification(), {"t": [(x[:4], y[:4])]}, damping=0.0), (x, y))
    assert bool(scores["ekfac"].isfinite().all())


@pytest.mark.parametrize("true_fisher", [False, True])
def test_ekfac_of_language_models_knows_neither_padding_nor_fusing(true_fisher: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False
    )
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(40, (12, 10))
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(12, 15, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), torch.zeros(12, 15, dtype=torch.long)], 1),
    }

    def scores(batch: dict[str, Tensor], task: CausalLM) -> Tensor:
        method = EKFAC(model, task, {"t": [plain]}, self_influence=True, true_fisher=true_fisher)
        table = assay.score([plain], [method.fit([batch])])
        return torch.tensor(table["ekfac"].to_pylist() + table["ekfac_self"].to_pylist())

    want = scores(plain, CausalLM())
    for got in (scores(padded, CausalLM()), scores(plain, CausalLM(fused=False))):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3 * float(want.abs().max()))
