"""TRAK, DsDm, LESS, LoGra, TrackStar and EK-FAC against their formulas with gradients multiplied out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import EKFAC, LESS, TRAK, AdamState, DsDm, GradientCosine, Kernel, LoGra, Scorer, TrackStar
from assay.methods.influence import Influence, damping_units
from assay.probe import Probe
from assay.tasks import CausalLM, Classification, Margin
from tests.methods.contract import texts

POOL = 60


@pytest.fixture
def problem() -> tuple[list[nn.Module], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Two checkpoints of a small network, a pool and a target of 5 samples."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    pool, target = (torch.randn(POOL, 6), torch.randint(3, (POOL,))), (torch.randn(5, 6), torch.randint(3, (5,)))
    return models, pool, target


def gradients(model: nn.Module, x: Tensor, y: Tensor, margin: bool = False) -> Tensor:
    """Per-sample gradients of −loss's sign: of the loss, or of the negative margin; one backward pass a sample."""
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]).double(), y[i : i + 1])
        if margin:
            loss = loss + torch.log(-torch.expm1(-loss))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


def probabilities(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).double().softmax(1)[torch.arange(len(x)), y].detach()


def run(method: Influence | EKFAC, pool: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    method.fit([pool])
    table = assay.score([pool], [method])
    return {name: torch.tensor(table[name].to_pylist()).double() for name in table.column_names[2:]}


EXACT = assay.Kronecker(64, 64)  # larger than any layer here: nothing is projected


def test_trak_is_its_formula_where_nothing_is_projected(problem) -> None:
    models, pool, target = problem
    method = TRAK(models, Classification(), {"t": [target]}, sketch=EXACT, damping=0.05)
    method.together = False  # end to end: exact, for every layer is smaller than the sketch
    got = run(method, pool)["trak"]
    kernel, doubt = torch.zeros(POOL).double(), torch.zeros(POOL).double()
    for model in models:
        phi, query = gradients(model, *pool, margin=True), gradients(model, *target, margin=True).mean(0)
        moment = phi.T @ phi / POOL
        moment += 0.05 * moment.diagonal().mean() * torch.eye(len(moment))
        kernel += phi @ torch.linalg.solve(moment, query) / 2
        doubt += (1 - probabilities(model, *pool)) / 2
    torch.testing.assert_close(got, kernel * doubt, rtol=1e-3, atol=1e-4 * float(kernel.abs().max()))


def test_several_targets_are_columns_and_their_mean(problem) -> None:
    models, pool, target = problem
    halves = {"a": [(target[0][:2], target[1][:2])], "b": [(target[0][2:4], target[1][2:4])]}
    scores = run(DsDm(models, Classification(), halves, name="dsdm"), pool)
    assert list(scores) == ["dsdm", "dsdm_a", "dsdm_b"]
    torch.testing.assert_close(scores["dsdm"], (scores["dsdm_a"] + scores["dsdm_b"]) / 2)
    one = run(DsDm(models, Classification(), {"x": [(target[0][:4], target[1][:4])]}, name="dsdm"), pool)
    scale = float(scores["dsdm"].abs().max())
    torch.testing.assert_close(one["dsdm"], scores["dsdm"], rtol=1e-3, atol=1e-4 * scale)  # averaged before or after


def test_scores_do_not_depend_on_batching(problem) -> None:
    models, pool, target = problem
    whole = run(TRAK(models, Classification(), {"t": [target]}), pool)["trak"]
    method = TRAK(models, Classification(), {"t": [(target[0][:1], target[1][:1]), (target[0][1:], target[1][1:])]})
    pieces = [(pool[0][i : i + 7], pool[1][i : i + 7]) for i in range(0, POOL, 7)]
    method.fit(pieces)
    table = assay.score(pieces, [method])
    torch.testing.assert_close(torch.tensor(table["trak"].to_pylist()).double(), whole, rtol=1e-3, atol=1e-4)


def test_less_is_a_cosine_of_adam_steps(problem) -> None:
    models, pool, target = problem
    states = []
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(pool[0]), pool[1]).backward()
            optimizer.step()
        model.zero_grad()
        states.append(AdamState.of(optimizer, model))
    subtasks = {"a": [(target[0][:3], target[1][:3])], "b": [(target[0][3:], target[1][3:])]}
    method = LESS(models, Classification(), subtasks, optimizers=states, weights=[3.0, 1.0], sketch=EXACT)
    method.together = False
    # AdamSketched sums parameters; end to end it is exact
    method.feature = lambda k, target: _end_to_end(method, k, target)  # type: ignore[method-assign]
    got = run(method, pool)
    each = []
    for part in subtasks.values():
        total = torch.zeros(POOL).double()
        for model, state, weight in zip(models, states, (0.75, 0.25), strict=True):
            step = torch.cat(
                [
                    state.step(name, g).flatten(1)
                    for name, g in zip(
                        dict(model.named_parameters()), _split(model, gradients(model, *pool)), strict=True
                    )
                ],
                1,
            )
            query = F.normalize(gradients(model, *part[0]), dim=1).mean(0)
            total += weight * F.normalize(step, dim=1) @ query
        each.append(total)
    torch.testing.assert_close(got["less_a"], each[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got["less"], torch.stack(each).amax(0), rtol=1e-3, atol=1e-4)
    assert bool((got["less"].abs() <= 1).all())


def _end_to_end(method: LESS, k: int, target: bool):
    from assay.methods.less import AdamSketched
    from assay.probe import Sketched

    if target:
        return Sketched(method.shapes, method.sketch)

    class Exact(AdamSketched):
        def __call__(self, parameter, gradient):
            return self.state.step(parameter, gradient.dense(), self.eps).flatten(1)

    return Exact(method.shapes, method.sketch, False, state=method.optimizers[k], eps="outside")


def _split(model: nn.Module, flat: Tensor) -> list[Tensor]:
    sizes = [p.numel() for p in model.parameters()]
    return [g.reshape(len(flat), *p.shape) for g, p in zip(flat.split(sizes, 1), model.parameters(), strict=True)]


def test_logra_blocks_and_trackstar_cosines(problem) -> None:
    models, pool, target = problem
    model = models[0]
    got = run(LoGra([model], Classification(), {"t": [target]}, sketch=EXACT), pool)["logra"]
    phi, query = gradients(model, *pool), gradients(model, *target).mean(0)
    want, start = torch.zeros(POOL).double(), 0
    for p in model.parameters():
        block = slice(start, start := start + p.numel())
        moment = phi[:, block].T @ phi[:, block] / POOL
        moment += 0.1 * moment.diagonal().mean() * torch.eye(len(moment))
        want += phi[:, block] @ torch.linalg.solve(moment, query[block])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    cosines = run(TrackStar([model], Classification(), {"t": [(pool[0][:1], pool[1][:1])]}), pool)["trackstar"]
    assert bool((cosines.abs() <= 1 + 1e-5).all())
    assert abs(float(cosines[0]) - 1) < 1e-4  # a sample with itself


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
    bias, third = method._bases["2.bias"].values, phi[:, -3:]  # the last parameter; the diagonal E[g²]
    torch.testing.assert_close(bias.double(), third.square().mean(0) + 1e-3, rtol=1e-5, atol=1e-7)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="damping: expected a finite number of at least 0, got"):
            EKFAC(models[0], Classification(), {"t": [target]}, damping=wrong)


def test_noise_is_damped_in_units_of_its_layer() -> None:
    names = ["a.key.weight", "a.key.bias", "b.weight", "b.bias", "c.bias"]
    assert damping_units(names, [1e-6, 1e-19, 2.0, 0.0, 1e-30]) == [1e-6, 1e-10, 2.0, 0.0, 1e-30]
    assert damping_units(["w.weight", "w.bias"], [0.01, 1.0]) == [0.01, 1.0]


@pytest.mark.parametrize("kind", ["ekfac", "logra", "trackstar"])
def test_gradients_that_are_0_but_for_rounding_stay_so(kind: str) -> None:
    """The key biases of attention: their noise in float32 is not that in float64, and must not be seen."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, y = torch.randint(50, (20, 8)), torch.randint(3, (20,))
    pool = [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, y)]
    target = {"t": [({"input_ids": ids[:4], "attention_mask": torch.ones_like(ids[:4])}, y[:4])]}

    def scores() -> Tensor:
        method: Influence | EKFAC
        if kind == "ekfac":
            method = EKFAC(model, Classification(), target, true_fisher=False)
        else:
            form = LoGra if kind == "logra" else TrackStar
            method = form([model], Classification(), target, sketch=assay.Kronecker(8, 8))
        return torch.tensor(assay.score(pool, [method.fit(pool)])[kind].to_pylist())

    single = scores()
    model.double()
    double = scores()
    torch.testing.assert_close(single, double, rtol=0, atol=2e-5 * float(double.abs().max()))


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


def test_every_batch_draws_labels_of_its_own() -> None:
    """One sample at a time, the curvature must still be an average over labels."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4, bias=False), torch.randn(1, 3).expand(200, 3)
    y = torch.zeros(200, dtype=torch.long)
    whole, single = (EKFAC(model, Classification(), self_influence=True).fit(b) for b in (
        [(x, y)], [(x[i : i + 1], y[i : i + 1]) for i in range(200)]
    ))  # fmt: skip
    a, b = (m._bases["weight"].values.sum() for m in (whole, single))
    assert abs(float(a / b) - 1) < 0.2
    assert int((single._bases["weight"].values > 2 * single._bases["weight"].values.min()).sum()) > 1


def test_ekfac_without_damping_and_without_gradient_is_zero_not_nan() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    x[:, 2] = 0  # a dead pixel
    scores = run(EKFAC(nn.Linear(5, 3), Classification(), {"t": [(x[:4], y[:4])]}, damping=0.0), (x, y))
    assert bool(scores["ekfac"].isfinite().all())


def test_ekfac_of_language_models_knows_neither_padding_nor_fusing() -> None:
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
        method = EKFAC(model, task, {"t": [plain]}, self_influence=True, true_fisher=False)
        table = assay.score([plain], [method.fit([batch])])
        return torch.tensor(table["ekfac"].to_pylist() + table["ekfac_self"].to_pylist())

    want = scores(plain, CausalLM())
    for got in (scores(padded, CausalLM()), scores(plain, CausalLM(fused=False))):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-3 * float(want.abs().max()))


def test_less_of_a_convolution_is_the_cosine_of_autograd() -> None:
    """The pool's Adam step comes multiplied out, the target's gradient in factors: one projection for both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.randn(30, 16), torch.randint(3, (30,))
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    state = AdamState.of(optimizer, model)
    target = (x[:3] * 1.1, y[:3])
    method = LESS([model], Classification(), {"t": [target]}, optimizers=[state], sketch=assay.Kronecker(256, 256))
    got = run(method, (x, y))["less"]
    steps = []
    for g in gradients(model, x, y).float():
        parts = g.split([p.numel() for p in model.parameters()])
        named = zip(model.named_parameters(), parts, strict=True)
        steps.append(torch.cat([state.step(n, p.view(1, *w.shape), "outside").flatten() for (n, w), p in named]))
    aim = F.normalize(gradients(model, *target), dim=1).mean(0).float()
    want = F.normalize(torch.stack(steps), dim=1) @ aim
    assert float(torch.corrcoef(torch.stack([got.float(), want]))[0, 1]) > 0.97


def test_a_sample_with_nothing_to_predict_has_no_score() -> None:
    """0 would rank it above every harmful sample."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(40, (6, 10))
    pool = {"input_ids": ids, "labels": ids.clone()}
    pool["labels"][2] = -100
    target = {"t": [{"input_ids": ids[:2]}]}
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    methods = [
        TRAK([model], CausalLM(), target),
        LESS([model], CausalLM(), target, optimizers=[AdamState(ones, ones)]),
        LoGra([model], CausalLM(), target),
        TrackStar([model], CausalLM(), target),
        EKFAC(model, CausalLM(), target, self_influence=True),
    ]
    for method in methods:
        table = assay.score([pool], [method.fit([pool])])
        for column in method.columns:
            scores = torch.tensor([float("nan") if v is None else v for v in table[column.name].to_pylist()])
            assert scores.isnan().tolist() == [False, False, True, False, False, False], column.name


@pytest.mark.parametrize("make", [TRAK, DsDm, LoGra, TrackStar])
def test_target_samples_without_a_finite_gradient_are_left_out(problem, make) -> None:
    models, pool, (x, y) = problem
    broken = x.clone()
    broken[1] = torch.inf
    kept = [0, 2, 3, 4]
    got, want = (
        run(make(models, Classification(), {"t": [t]}, sketch=EXACT), pool) for t in ((broken, y), (x[kept], y[kept]))
    )
    for name, score in got.items():
        torch.testing.assert_close(score, want[name], rtol=1e-3, atol=1e-4 * float(score.abs().max()))
    with pytest.raises(ValueError, match="none of target 't''s 1 samples has a finite gradient"):
        make(models, Classification(), {"t": [(broken[1:2], y[1:2])]}).fit([pool])


def test_trackstar_does_not_depend_on_the_gradients_scale(problem) -> None:
    models, pool, target = problem
    want = run(TrackStar(models, Classification(), {"t": [target]}), pool)["trackstar"]

    class Scaled(Classification):
        def forward(self, model: nn.Module, batch: Any) -> Any:
            outputs = super().forward(model, batch)
            return outputs.with_losses(outputs.losses * 1e-5)

    got = run(TrackStar(models, Scaled(), {"t": [target]}), pool)["trackstar"]
    torch.testing.assert_close(got, want, rtol=1e-2, atol=2e-3)


def test_language_models() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(40, (12, 10))
    batch, target = {"input_ids": ids}, {"input_ids": ids[:2]}
    for make in (TRAK, DsDm, LoGra):
        fused = make([model], CausalLM(), {"t": [target]}).fit([batch])
        plain = make([model], CausalLM(fused=False), {"t": [target]}).fit([batch])
        a, b = (torch.tensor(assay.score([batch], [m])[m.name].to_pylist()) for m in (fused, plain))
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(b.abs().max()))


def test_errors(problem) -> None:
    models, pool, target = problem
    with pytest.raises(ValueError, match="target 'empty' has no samples"):
        TRAK(models, Classification(), {"empty": []}).fit([pool])
    with pytest.raises(ValueError, match="needs samples of the pool"):
        TRAK(models, Classification(), {"t": [target]}).fit([])
    with pytest.raises(RuntimeError, match="call fit"):
        TRAK(models, Classification(), {"t": [target]}).score({})
    with pytest.raises(ValueError, match=r"checkpoint 1 differs from checkpoint 0 in parameter '0\.weight'"):
        TRAK([models[0], nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))], Classification(), {"t": []})
    with pytest.raises(ValueError, match=r"no exp_avg for parameter '0\.weight'"):
        LESS([models[0]], Classification(), {"t": []}, optimizers=[AdamState({}, {})])
    with pytest.raises(ValueError, match="one optimiser state per checkpoint, 2, got 1"):
        LESS(models, Classification(), {"t": []}, optimizers=[AdamState({}, {})])
    with pytest.raises(ValueError, match="expected at least one target"):
        TRAK(models, Classification(), {})
    with pytest.raises(ValueError, match=r"singular with damping 0\.0"):
        TRAK(models, Classification(), {"t": [target]}, damping=0.0, sketch=assay.Kronecker(16, 16)).fit([pool])


def test_numbers_out_of_range_are_named_before_any_work(problem) -> None:
    models, _, target = problem
    given = (models, Classification(), {"t": [target]})
    for make in (TRAK, DsDm, LoGra, TrackStar):
        for wrong in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"damping: expected a finite number of at least 0, got {wrong}"):
                make(*given, damping=wrong)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"target_share: expected a number from 0 to 1, got {share}"):
            TrackStar(*given, target_share=share)
    with pytest.raises(ValueError, match="eps 'in'; expected 'outside' or 'inside'"):
        LESS(*given, optimizers=None, eps="in")
    with pytest.raises(ValueError, match="across 'sum'; expected 'mean' or 'max'"):
        Kernel(across="sum")
    with pytest.raises(ValueError, match="weights: expected one weight per model"):
        LESS(*given, optimizers=None, weights=[1.0])
    huge = assay.Rademacher(10**6)
    with pytest.raises(ValueError, match=r"trak: Rademacher.* 1,000,000 numbers, whose second moments take 14,901 GiB"):
        TRAK(*given, sketch=huge)
    LESS(*given, optimizers=None, sketch=huge)  # has no second moment


def test_scores_of_features_are_those_of_the_models(problem) -> None:
    models, pool, target = problem
    method = TRAK(models, Classification(), {"a": [target], "b": [(target[0][:2], target[1][:2])]}).fit([pool])
    signals = Scorer([method])
    table = signals(pool)
    probes = [Probe(need.model, need.task, reductions=need.reductions) for need in method.needs().values()]
    features, doubts = method.raw_features({f"model{k}": probe(pool) for k, probe in enumerate(probes)})
    assert [tuple(f.shape) for f in features] == [(POOL, 256)] * 2
    scores = method.score_features(features, doubts)
    assert list(scores) == list(table) == ["trak", "trak_a", "trak_b"]
    for name, values in table.items():
        torch.testing.assert_close(scores[name], values)
    rounded = method.score_features([f.half() for f in features], doubts)["trak"]  # computed with in float32
    assert rounded.dtype == torch.float32
    widened = method.score_features([f.half().float() for f in features], doubts)["trak"]
    assert torch.equal(rounded, widened)
    assert method.score_features([f[:0] for f in features], [d[:0] for d in doubts or ()])["trak"].shape == (0,)


def test_score_features_says_what_it_wants(problem) -> None:
    models, _, target = problem
    method = LESS(models, Classification(), {"t": [target]}, optimizers=None, name="m")
    features = [torch.zeros(3, 4096)] * 2
    with pytest.raises(RuntimeError, match=r"m: call fit\(\) before scoring"):
        method.score_features(features)
    method.fit()
    for wrong in (features[:1], [features[0], torch.zeros(3, 5)], [features[0], torch.zeros(2, 4096)], []):
        with pytest.raises(ValueError, match=r"m: expected features \(B, 4096\) of 2 checkpoints, got "):
            method.score_features(wrong)
    with pytest.raises(ValueError, match=r"m: expected doubts none, got \(3,\), \(3,\)"):
        method.score_features(features, [torch.zeros(3)] * 2)
    doubting = TRAK(models, Classification(), {"t": [target]}, name="m").fit([target])
    with pytest.raises(ValueError, match=r"m: expected doubts \[\(3,\), \(3,\)\], got none"):
        doubting.score_features([torch.zeros(3, 256)] * 2)


def test_a_margin_of_nothing_is_nan_and_no_part_of_a_targets_mean() -> None:
    world = texts()
    broken = world.collate([world.broken, world.samples[0]])
    assert Margin(CausalLM()).forward(world.models[0], broken).losses.isnan().tolist() == [True, False]
    scores = []
    for silent in (0, 5):
        target = world.collate([*world.samples[:4], *[world.broken] * silent])
        method = Influence(world.models[:1], Margin(CausalLM()), {"t": [target]}, Kernel(), EXACT)
        scores.append(Scorer([method.fit()])(world.pool[0])["influence"])
    torch.testing.assert_close(*scores)
