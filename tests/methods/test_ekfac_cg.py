"""EK-FAC + CG: the dense solve with the whole Gauss–Newton matrix, whatever it starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import assay
from assay.methods import EKFACCG, Scorer
from assay.methods.gauss_newton import GaussNewton, trace_of
from assay.tasks import CausalLM, Classification, Regression
from tests.methods.small_problem import POOL, gradients, run


def gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """(P, P) float64: E JᵀSJ, by Jacobians."""
    theta = {name: p.detach().double() for name, p in model.named_parameters()}
    found = vmap(jacrev(lambda t, row: functional_call(model, t, (row[None],))[0]), (None, 0))(theta, x.double())
    jacobian = torch.cat([j.flatten(2) for j in found.values()], 2)
    p = functional_call(model, theta, (x.double(),)).softmax(1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian) / len(x)


def test_it_is_the_dense_solve(problem: Any) -> None:
    models, (x, y), target = problem
    method = EKFACCG(models[0], Classification(), {"a": [target], "b": [(x[:2], y[:2])]}, iterations=60)
    got = run(method, (x, y))
    matrix, phi = gauss_newton(models[0], x), gradients(models[0], x, y)
    like = {name: torch.zeros_like(p) for name, p in models[0].named_parameters()}
    total = trace_of(GaussNewton(models[0], Classification(), list(like), [(x, y)]), like)
    assert total == pytest.approx(float(matrix.trace()), rel=0.3)
    damping = 2 * total / len(matrix)
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))
    for name, batch in (("a", target), ("b", (x[:2], y[:2]))):
        want = phi @ inverse @ gradients(models[0], *batch).mean(0)
        error = (got[f"ekfac_cg_{name}"].double() - want).norm() / want.norm()
        assert float(error) < 5e-3, name
    facts = method.metadata()
    assert float(facts["residual"]) <= 1e-3
    assert int(facts["iterations"]) < 60
    assert facts["left_out"] == "0"
    assert facts["damping"] == "2.0 mean eigenvalues"


class _Few(nn.Module):
    """Its ``extra`` is used by some samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.head = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        few = (x[:, :1] > 0.5).to(x)
        hidden = self.first(x) + few * self.extra(x) if bool(few.any()) else self.first(x)
        out: Tensor = self.head(hidden.tanh())
        return out


def _dense(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(P, P) the Gauss-Newton matrix, and (N, P) the samples' gradients."""
    parameters, rows, total = list(model.parameters()), [], torch.zeros(())
    for one, label in zip(x, y, strict=True):
        z = model(one[None])[0]
        p = z.softmax(0).detach()
        made = [torch.autograd.grad(z[c], parameters, retain_graph=True, allow_unused=True) for c in range(len(z))]
        flat = [[torch.zeros_like(q) if g is None else g for g, q in zip(m, parameters, strict=True)] for m in made]
        jacobian = torch.stack([torch.cat([g.flatten() for g in own]) for own in flat])
        total = total + jacobian.T @ (p.diag() - p[:, None] * p) @ jacobian
        rows.append((p - nn.functional.one_hot(label, len(p))) @ jacobian)
    return total / len(x), torch.stack(rows)


@pytest.mark.parametrize("pool", ["all", "without extra"])
def test_the_matrix_is_whole_where_a_target_or_the_pool_does_not_reach_a_layer(pool: str) -> None:
    torch.manual_seed(0)
    model, x, y = _Few().double(), torch.randn(30, 3, dtype=torch.float64), torch.randint(3, (30,))
    uses = x[:, 0] > 0.5
    given = torch.ones_like(uses) if pool == "all" else ~uses
    targets = {"uses": [(x[uses][:2], y[uses][:2])], "does not": [(x[~uses][:2], y[~uses][:2])]}
    method = EKFACCG(model, Classification(), targets, iterations=60).fit([(x[given], y[given])])
    table = assay.score([(x, y)], [method])
    matrix, _ = _dense(model, x[given], y[given])
    like = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    used = [p.numel() for name, p in like.items() if pool == "all" or not name.startswith("extra")]
    damping = 2 * trace_of(GaussNewton(model, Classification(), list(like), [(x[given], y[given])]), like) / sum(used)
    inverse = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))
    for name, (batch,) in targets.items():
        want = _dense(model, x, y)[1] @ inverse @ _dense(model, *batch)[1].mean(0)
        got = torch.tensor(table[f"ekfac_cg_{name}"].to_pylist()).double()
        assert float((got - want).norm() / want.norm()) < 5e-3, name
    assert float(method.metadata()["residual"]) <= 1e-3


def test_a_training_damps_by_how_far_it_went(problem: Any) -> None:
    models, pool, target = problem
    method = EKFACCG(models[0], Classification(), {"t": [target]}, rate_sum=20.0, iterations=60)
    got, matrix = run(method, pool)["ekfac_cg"], gauss_newton(models[0], pool[0])
    inverse = torch.linalg.inv(matrix + torch.eye(len(matrix), dtype=torch.float64) / 20)
    want = gradients(models[0], *pool) @ inverse @ gradients(models[0], *target).mean(0)
    assert float((got - want).norm() / want.norm()) < 5e-3
    assert method.metadata()["damping"] == "1/20"


def test_a_pool_without_curvature_is_damped_by_a_training_all_the_same() -> None:
    """Of a model that is sure of every sample S is 0, and right or wrong G is: x = g/λ is left."""
    model = nn.Linear(2, 3).double()
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1] * 4)  # class 2 is what it is sure of
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 0.0, 2000.0]))
    target = {"t": [(x[:3], y[:3])]}
    got = run(EKFACCG(model, Classification(), target, rate_sum=20.0), (x, y))["ekfac_cg"]
    want = 20 * gradients(model, x, y) @ gradients(model, x[:3], y[:3]).mean(0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"the pool's curvature is 0, .*; give rate_sum"):
        run(EKFACCG(model, Classification(), target), (x, y))


def test_a_solution_that_is_none_is_told_of(problem: Any, caplog: pytest.LogCaptureFixture) -> None:
    models, pool, target = problem
    method = EKFACCG(models[0], Classification(), {"t": [target]}, damping=1e-6, iterations=1).fit([pool])
    assert float(method.metadata()["residual"]) > 0.5
    assert "far from solved" in caplog.text


def test_a_damping_beyond_all_curvature_ranks_as_the_dot_product(problem: Any) -> None:
    models, pool, target = problem
    got = run(EKFACCG(models[0], Classification(), {"t": [target]}, damping=1e5), pool)["ekfac_cg"].double()
    want = gradients(models[0], *pool) @ gradients(models[0], *target).mean(0)
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.9999


def test_products_of_parts_of_a_model_and_of_regression() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(9, 4)
    v = {name: torch.randn_like(p) for name, p in model.named_parameters() if name.startswith("0")}
    product = GaussNewton(model, Regression(), list(v), [(x[:4], torch.randn(4, 2)), (x[4:], torch.randn(5, 2))])
    # S of the mean over two outputs of (prediction - y)² is I
    theta = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(jacrev(lambda t, row: functional_call(model, theta | t, (row[None],))[0]), (None, 0))(
        {name: theta[name] for name in v}, x
    )
    jacobian = torch.cat([found[name].flatten(2) for name in v], 2)
    flat = torch.cat([own.flatten() for own in v.values()])
    want = torch.einsum("ncp,ncq,q->p", jacobian, jacobian, flat) / 9
    got = torch.cat([own.flatten() for own in product([v])[0].values()])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_language_model_with_attention_and_texts_without_tokens() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.embed(input_ids)[:, None]
            return self.head(nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0])

    torch.manual_seed(0)
    model, ids = Model(), torch.randint(9, (8, 5))
    silent = {"input_ids": ids, "labels": torch.where(torch.arange(8)[:, None] < 6, ids, -100)}
    method = EKFACCG(model, CausalLM(), {"t": [{"input_ids": ids[:2]}]})
    want = Scorer([method.fit([{"input_ids": ids[:6]}])])({"input_ids": ids})["ekfac_cg"]
    got = Scorer([method.fit([silent])])({"input_ids": ids})["ekfac_cg"]
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2 * float(want.abs().max()))  # up to the residual
    mean, total = (GaussNewton(model, CausalLM(r), ["head.weight"], [{"input_ids": ids}]) for r in ("mean", "sum"))
    v = [{"head.weight": torch.randn(9, 8)}]
    torch.testing.assert_close(
        4 * mean(v)[0]["head.weight"], total(v)[0]["head.weight"]
    )  # five tokens, four of them predicted


def test_a_broken_sample_is_left_out_and_counted_and_its_batch_is_not(problem: Any) -> None:
    models, (x, y), target = problem
    half, kept = POOL // 2, torch.arange(POOL) != POOL // 2 + 1
    broken = x.clone()
    broken[half + 1] = torch.inf
    found = []
    for pool in ([(broken[:half], y[:half]), (broken[half:], y[half:])], [(x[kept], y[kept])]):
        method = EKFACCG(models[0], Classification(), {"t": [target]}, iterations=60).fit(pool)
        assert method.metadata()["left_out"] == str(len(pool) - 1)
        found.append(torch.tensor(assay.score([(x, y)], [method])["ekfac_cg"].to_pylist()))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 5e-3


class _Flat(nn.Linear):
    """Cannot take a batch of no sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(len(x), -1))


def test_a_batch_without_samples_is_none(problem: Any) -> None:
    _, (x, y), _ = problem
    model = _Flat(x.shape[1], int(y.max()) + 1)
    vector = [{"weight": torch.ones_like(model.weight)}]
    product = GaussNewton(model, Classification(), ["weight"], [(x[:0], y[:0]), (x, y)])
    (got,), (want,) = product(vector), GaussNewton(model, Classification(), ["weight"], [(x, y)])(vector)
    assert torch.equal(got["weight"], want["weight"])
    assert (product.left_out, product.counts) == (0, {0: 0, 1: POOL})


def test_within_inference_mode(problem: Any) -> None:
    models, (x, y), target = problem
    found = []
    for mode in (False, True):
        with torch.inference_mode(mode):
            method = EKFACCG(models[0], Classification(), {"t": [target]}, iterations=2).fit([(x, y)])
            found.append(Scorer([method])((x, y))["ekfac_cg"])
    assert torch.equal(*found)


class _Centred(nn.Linear):
    """Its samples are not apart."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def test_products_are_without_the_samples_that_have_none(problem: Any) -> None:
    models, (x, y), _ = problem
    names = [name for name, _ in models[0].named_parameters()]
    vector = [{name: torch.ones_like(p) for name, p in models[0].named_parameters()}]
    bad = torch.tensor([0, 3, 4])
    kept = torch.ones(POOL, dtype=torch.bool).index_fill(0, bad, False)
    product = GaussNewton(models[0], Classification(), names, [(x.index_fill(0, bad, torch.nan), y)])
    (want,) = GaussNewton(models[0], Classification(), names, [(x[kept], y[kept])])(vector)
    for _ in range(2):
        (got,) = product(vector)
        assert (product.left_out, product.samples) == (3, POOL - 3)
        for name, own in got.items():
            torch.testing.assert_close(own, want[name])
    with pytest.raises(ValueError, match="no sample with a loss and finite derivatives"):
        GaussNewton(models[0], Classification(), names, [(torch.full_like(x, torch.nan), y)])(vector)
    centred = _Centred(x.shape[1], int(y.max()) + 1)
    batches = [(x, y), (x.index_fill(0, bad, torch.nan), y)]
    product = GaussNewton(centred, Classification(), ["weight"], batches)
    product([{"weight": torch.ones_like(centred.weight)}])
    assert (product.left_out, product.samples) == (POOL, POOL)


class _EndToEnd(nn.Linear):
    """Three rows to a sample, one after another."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows.reshape(-1, 3, rows.shape[1]).mean(1))


def test_a_batch_that_cannot_be_taken_apart_is_left_out_whole() -> None:
    rows, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
    broken = rows.index_fill(0, torch.tensor([4]), torch.inf)
    model = _EndToEnd(5, 2)
    product = GaussNewton(model, Classification(), ["weight"], [(rows, y), (broken, y)])
    product([{"weight": torch.ones_like(model.weight)}])
    assert (product.left_out, product.samples) == (4, 4)


def test_what_is_refused(problem: Any) -> None:
    models, _, target = problem
    for words, options in (
        ("damping: expected a finite number above 0, got 0", {"damping": 0}),
        ("rate_sum: expected a finite number above 0, got -1", {"rate_sum": -1}),
        ("ekfac_cg: expected damping or rate_sum, of which λ is made, not both", {"damping": 1.0, "rate_sum": 1.0}),
        ("damping: expected a finite number", {"damping": float("nan")}),
        ("iterations: expected a finite number of at least 1, got 0", {"iterations": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            EKFACCG(models[0], Classification(), {"t": [target]}, **options)
    with pytest.raises(ValueError, match="nothing to compute; give targets"):
        EKFACCG(models[0], Classification(), {})


def test_a_layer_with_two_names_keeps_its_parameters() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    before, batch = list(model.parameters()), (torch.randn(6, 3), torch.arange(6) % 3)
    run(EKFACCG(model, Classification(), {"a": [batch]}), batch)
    assert list(map(id, model.parameters())) == list(map(id, before))


def test_a_regression_is_solved_as_well() -> None:
    """(2 E xxᵀ + λI)⁻¹ of one output, with no label drawn."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1, bias=False).double(), torch.randn(20, 3).double(), torch.randn(20, 1).double()
    method = EKFACCG(model, Regression(), {"a": [(x[:4], y[:4])]}, rate_sum=2.0, iterations=60)
    got = run(method, (x, y))["ekfac_cg"]
    phi = 2 * (model(x) - y).detach() * x
    want = phi @ torch.linalg.inv(2 * x.T @ x / 20 + torch.eye(3) / 2) @ phi[:4].mean(0)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)
