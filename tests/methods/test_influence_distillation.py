"""Influence Distillation against exact cosines, and its embeddings against differentiation by other means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import AdamState, Ensemble, InfluenceDistillation
from assay.probe import Jvp, Probe
from assay.tasks import CausalLM, Classification

POOL = 60
EXACT = assay.Kronecker(64, 64)  # larger than any layer here: with together=False nothing is projected


@pytest.fixture
def problem() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, (torch.randn(POOL, 6), torch.randint(3, (POOL,))), (torch.randn(5, 6), torch.randint(3, (5,)))


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


def run(method: InfluenceDistillation, fit, pool) -> dict[str, Tensor]:
    method.fit(fit)
    table = assay.score(pool, [method])
    return {name: torch.tensor(table[name].to_pylist()).double() for name in table.column_names[2:]}


def cosines(model: nn.Module, pool, target) -> Tensor:
    return F.normalize(gradients(model, *pool), dim=1) @ F.normalize(gradients(model, *target).mean(0), dim=0)


@pytest.mark.parametrize("kernel", ["rbf", "linear"])
def test_all_points_as_landmarks_reproduce_the_cosines(problem, kernel) -> None:
    model, pool, target = problem
    if kernel == "linear":  # K_LL has the rank of the embeddings: no more landmarks than their numbers
        pool = (pool[0][:24], pool[1][:24])
    method = InfluenceDistillation(
        model, Classification(), {"t": [target]}, kernel=kernel, damping=1e-12, tangents=8, sketch=EXACT
    )
    method.together = False
    got = run(method, [pool], [pool])["influence_distillation"]
    torch.testing.assert_close(got, cosines(model, pool, target), rtol=0, atol=2e-3)


def test_few_landmarks_follow_the_cosines_and_more_follow_them_better(problem) -> None:
    model, _, target = problem
    torch.manual_seed(1)
    x = torch.randn(600, 6)
    pool = (x, model(x).argmax(1))
    exact = cosines(model, pool, target)
    errors = []
    for landmarks in (20, 80, 320):
        method = InfluenceDistillation(
            model, Classification(), {"t": [target]}, landmarks=landmarks, tangents=4, sketch=EXACT
        )
        method.together = False
        got = run(method, [pool], [pool])["influence_distillation"]
        errors.append(float((got - exact).square().mean() / exact.var()))
        assert method.metadata()["landmarks"] == str(landmarks)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5


def test_the_ridge_is_its_formula(problem) -> None:
    model, pool, target = problem
    method = InfluenceDistillation(model, Classification(), {"t": [target]}, sketch=EXACT, damping=0.1, landmarks=20)
    method.together = False
    got = run(method, [pool], [pool])["influence_distillation"]
    embeddings = Probe(model, Classification(), reductions={"e": method.embedding})(pool).reduced["e"].double()
    drawn = torch.randperm(POOL, generator=torch.Generator().manual_seed(0))[:20].sort().values
    distances = torch.cdist(embeddings, embeddings[drawn])
    own = distances[drawn]
    bandwidth = own[own > 0].median()
    kernel = torch.exp(-distances.square() / (2 * bandwidth**2))
    ridge = torch.linalg.solve(kernel[drawn] + 0.1 * torch.eye(20), cosines(model, pool, target)[drawn])
    torch.testing.assert_close(got, kernel @ ridge, rtol=0, atol=1e-4)


def test_landmark_correlation_is_that_of_refitting_without_each(problem) -> None:
    model, pool, target = problem
    method = InfluenceDistillation(model, Classification(), {"t": [target]}, sketch=EXACT, damping=0.1, kernel="linear")
    method.together = False
    method.fit([pool])
    embeddings, p = method._anchors, cosines(model, pool, target)
    delta = 0.1 * (embeddings @ embeddings.T).diagonal().mean()
    predicted = []
    for i in range(POOL):
        rest = torch.arange(POOL) != i
        gram = embeddings[rest] @ embeddings[rest].T + delta * torch.eye(POOL - 1)
        predicted.append(embeddings[i] @ embeddings[rest].T @ torch.linalg.solve(gram, p[rest]))
    want = torch.corrcoef(torch.stack([torch.stack(predicted), p]))[0, 1]
    assert abs(float(method.metadata()["landmark_correlation"]) - float(want)) < 1e-3


def test_targets_batches_and_optimizer(problem) -> None:
    model, pool, target = problem
    halves = {"a": [(target[0][:2], target[1][:2])], "b": [(target[0][2:], target[1][2:])]}
    whole = run(InfluenceDistillation(model, Classification(), halves), [pool], [pool])
    assert list(whole) == ["influence_distillation", "influence_distillation_a", "influence_distillation_b"]
    each = [whole["influence_distillation_a"], whole["influence_distillation_b"]]
    torch.testing.assert_close(whole["influence_distillation"], torch.stack(each).mean(0))
    pieces = [(pool[0][i : i + 7], pool[1][i : i + 7]) for i in range(0, POOL, 7)]
    split = run(InfluenceDistillation(model, Classification(), halves), pieces, pieces)
    torch.testing.assert_close(split["influence_distillation_a"], each[0], rtol=0, atol=1e-4)
    names = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    optimizer = AdamState(names, {n: torch.ones_like(p) for n, p in names.items()})  # a step is g, up to scale
    adam = run(InfluenceDistillation(model, Classification(), halves, optimizer=optimizer), [pool], [pool])
    torch.testing.assert_close(adam["influence_distillation_a"], each[0], rtol=0, atol=2e-3)


def test_with_an_optimiser_landmarks_are_scaled_by_adams_diagonal_alone(problem) -> None:
    """All points as landmarks. The momentum, which all samples share, must not be in their cosines."""
    model, pool, target = problem
    first, second = ({n: torch.rand_like(p) for n, p in model.named_parameters()} for _ in "mv")
    state = AdamState(first, second, betas=(0.9, 0.99), eps=0.1, steps=5)
    method = InfluenceDistillation(
        model, Classification(), {"t": [target]}, damping=1e-12, tangents=8, sketch=EXACT, optimizer=state
    )
    method.together = False
    got = run(method, [pool], [pool])["influence_distillation"]
    scale = torch.cat([1 / ((second[n] / (1 - 0.99**5)).sqrt() + 0.1).flatten() for n, _ in model.named_parameters()])
    aim = F.normalize(gradients(model, *target).mean(0), dim=0)
    torch.testing.assert_close(got, F.normalize(gradients(model, *pool) * scale, dim=1) @ aim, rtol=0, atol=2e-3)


def by_autograd(model: nn.Module, tangent, output) -> Tensor:
    """J v through jacobians by reverse mode, one number at a time."""
    value = output()
    columns = []
    names = list(tangent)
    known = dict(model.named_parameters())
    for number in value.flatten():
        grads = torch.autograd.grad(number, [known[n] for n in names], retain_graph=True, allow_unused=True)
        columns.append(sum((g * tangent[n]).sum() for n, g in zip(names, grads, strict=True) if g is not None))
    return torch.stack([torch.as_tensor(c) for c in columns]).reshape(value.shape).detach()


def test_jvp_of_logits_is_the_derivative(problem) -> None:
    model, pool, _ = problem
    tangent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    got = Probe(model, Classification(), reductions={"e": Jvp([tangent, tangent])})(pool).reduced["e"]
    want = by_autograd(model, tangent, lambda: model(pool[0]))
    torch.testing.assert_close(got, torch.cat([want, want], 1), rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model._forward_hooks


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def setup_context(context, inputs, output) -> None:
        pass

    @staticmethod
    def backward(context, grad: Tensor) -> Tensor:
        return grad


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(NoForwardMode.apply(x))


def test_jvp_without_forward_mode_is_a_central_difference(problem) -> None:
    model, pool, _ = problem
    opaque = nn.Sequential(model[0], Opaque(), model[2])
    tangent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    exact = Jvp([tangent])(model, Classification(), pool)
    differenced = Jvp([tangent])(opaque, Classification(), pool)
    assert not torch.equal(differenced, exact)  # it did take the other way
    torch.testing.assert_close(differenced, exact, rtol=0, atol=2e-4 * float(exact.abs().max()))


def test_jvp_of_a_language_model_ignores_padding_and_stops_at_its_layer() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(40, (3, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    tangent = {n: torch.randn_like(p) for n, p in model.named_parameters() if ".h.0." in n or "wte" in n}
    batch = {"input_ids": ids, "attention_mask": mask}
    ran: list[int] = []
    handle = model.transformer.h[1].register_forward_hook(lambda *_: ran.append(1))
    got = Jvp([tangent], at="transformer.h.1")(model, CausalLM(), batch)
    handle.remove()
    assert not ran
    caught: list[Tensor] = []
    handle = model.transformer.h[1].register_forward_pre_hook(lambda m, args: caught.append(args[0]))

    def last() -> Tensor:
        caught.clear()
        model(**batch)
        return caught[0][torch.arange(3), mask.sum(1) - 1]

    torch.testing.assert_close(got, by_autograd(model, tangent, last), rtol=1e-3, atol=1e-4)
    handle.remove()
    alone = Jvp([tangent])(model, CausalLM(), {"input_ids": ids[:1, :6]})
    padded = Jvp([tangent])(model, CausalLM(), batch)
    torch.testing.assert_close(alone, padded[:1], rtol=1e-3, atol=1e-4)
    method = InfluenceDistillation(
        model, CausalLM(), {"t": [batch]}, embed_layers="transformer.h.0.*", at="transformer.h.1"
    )
    scores = run(method, [{"input_ids": ids}], [batch])["influence_distillation"]
    assert bool(scores.isfinite().all())


def test_jvp_leaves_shared_modules_and_tied_weights_as_they_were() -> None:
    torch.manual_seed(0)
    shared, last = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
    last.weight = shared.weight
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), last)
    pool = (torch.randn(7, 5), torch.randint(5, (7,)))
    tangent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    before = {(m, n): p for m in model.modules() for n, p in m._parameters.items()}
    got = Jvp([tangent])(model, Classification(), pool)
    Jvp([tangent], at="4")(model, Classification(), pool)
    assert all(m._parameters[n] is p for (m, n), p in before.items())
    torch.testing.assert_close(got, by_autograd(model, tangent, lambda: model(pool[0])), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Jvp([tangent])(model, Classification(), (pool[0][:, :3], pool[1]))
    assert all(m._parameters[n] is p for (m, n), p in before.items())


def test_the_embedding_is_projected_where_it_is_long(problem) -> None:
    model, pool, _ = problem
    tangent = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    whole = Jvp([tangent])(model, Classification(), pool)
    sketch = assay.Rademacher(2, 3)
    small = Jvp([tangent], sketch=sketch)(model, Classification(), pool)
    torch.testing.assert_close(small, assay.ops.project(whole, sketch))


def test_errors(problem) -> None:
    model, pool, target = problem

    def make(**options) -> InfluenceDistillation:
        return InfluenceDistillation(model, Classification(), {"t": [target]}, **options)

    with pytest.raises(RuntimeError, match="call fit"):
        make().score({})
    with pytest.raises(ValueError, match="2 samples of the pool"):
        make().fit([])
    with pytest.raises(ValueError, match="kernel 'poly'; expected 'rbf' or 'linear'"):
        make(kernel="poly")
    with pytest.raises(ValueError, match="2 landmarks and 1 tangent"):
        make(landmarks=1)
    with pytest.raises(ValueError, match=r"kernel of 60 landmarks is singular with damping 0\.0"):
        make(damping=0.0, kernel="linear").fit([pool])  # embeddings of 6 numbers
    with pytest.raises(ValueError, match="target 'x' has no samples"):
        InfluenceDistillation(model, Classification(), {"x": []}).fit([pool])
    with pytest.raises(ValueError, match="expected exactly one"):
        make(at="nowhere").fit([pool])


def test_a_sample_whose_embedding_is_beyond_float32_has_no_score() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(POOL, 6), torch.randint(3, (POOL,))
    method = InfluenceDistillation(model, Classification(), {"t": [(x[:5], y[:5])]}, tangents=8)
    expected = run(method, [(x, y)], [(x, y)])["influence_distillation"]
    far = x.clone()
    far[7] = torch.tensor([3e38, 0, 0, 0, 0, 0])
    found = assay.score([(far, y)], [method, Ensemble([model], Classification())])
    assert np.isfinite(found["ensemble_nll"].to_numpy()).all()  # its loss is a number
    scores = torch.tensor(found["influence_distillation"].to_pylist()).double()
    assert scores.isnan().nonzero().tolist() == [[7]]
    torch.testing.assert_close(scores[:7], expected[:7], rtol=1e-4, atol=1e-5)


def test_layers_that_are_left_out_are_named():
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.odd = nn.Linear(5, 3, bias=False), Odd(5, 3, bias=False)

        def forward(self, x):
            return self.first(x) + self.odd(x)

    class Odd(nn.Linear):
        """Computes by what cannot be followed."""

        def forward(self, x):
            return torch.einsum("bi,oi->bo", x, self.weight)

    torch.manual_seed(0)
    batches = [(torch.randn(12, 5), torch.arange(12) % 3)]
    method = InfluenceDistillation(
        Halved(), Classification(), {"t": batches}, landmarks=8, sketch=assay.Kronecker(4, 4), skip_unsupported=True
    )
    facts = method.fit(batches).metadata()
    assert facts["left_out_layers"] == "odd"
    assert facts["coverage"] == "0.5000"


def test_a_sample_with_nothing_to_predict_is_no_landmark() -> None:
    torch.manual_seed(0)
    model, ids = _Words(), torch.randint(1, 9, (8, 5))
    labels = ids.clone()
    labels[3] = -100
    batch = {"input_ids": ids, "labels": labels}
    method = InfluenceDistillation(model, CausalLM(), {"a": [{"input_ids": ids[:2]}]}).fit([batch])
    assert method.metadata()["landmarks"] == "7"
    assert method.metadata()["left_out"] == "0"


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids).tanh())
        return out
