"""Sketches of a whole model's per-sample gradients against the sketch of the gradient multiplied out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.ops import Sketch, grad_sketch, project
from assay.probe import PerSampleGradient, Probe, Sketched, tapped_parameters
from assay.tasks import CausalLM, Classification, Task

SKETCHES = {
    "kronecker": assay.Kronecker(4, 3, seed=5),
    "sparse": assay.Sparse(20, seed=5),
    "rademacher": assay.Rademacher(20, seed=5),
}


class Network(nn.Module):
    """An embedding, a convolution, a grouped one, a norm, a layer used twice, and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.conv, self.grouped = nn.Conv1d(6, 8, 3, padding=1), nn.Conv1d(8, 8, 3, groups=2)
        self.norm, self.twice, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.conv(self.embed(x).mT).relu()).mT
        h = self.twice(self.twice(self.norm(h)).relu())
        return self.head(h.mean(1))


def language_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config)  # tied, transposed weights


def dense_gradients(model: nn.Module, task: Task, batch: Any) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    class Keep:
        parameters = tapped_parameters(model)

        def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
            kept[parameter] = gradient.dense()
            return torch.zeros(gradient.samples)

    Probe(model, task, reductions={"x": Keep()})(batch)
    return kept


def sketch_of(dense: Tensor, sketch: Sketch) -> Tensor:
    """The definition: a matrix from both sides under Kronecker, anything else as one vector."""
    if not isinstance(sketch, assay.Kronecker):
        return project(dense.flatten(1), sketch)
    if dense.ndim == 2:
        return project(dense, assay.Rademacher(sketch.dim, seed=sketch.seed, name=sketch.name))
    matrix = dense.flatten(2)
    left = sketch.output_side(matrix.shape[1]).to(matrix)
    return (left @ matrix @ sketch.input_side(matrix.shape[2]).to(matrix).T).flatten(1)


@pytest.mark.parametrize("name", SKETCHES)
@pytest.mark.parametrize("case", ["network", "language model", "fused language model"])
def test_equals_the_sketch_of_the_dense_gradient(case: str, name: str) -> None:
    sketch = SKETCHES[name]
    if case == "network":
        model, task, batch = Network(), Classification(), (torch.randint(9, (4, 7)), torch.randint(5, (4,)))
    else:
        model, task = language_model(), CausalLM(fused=case.startswith("fused"))
        batch = {"input_ids": torch.randint(30, (3, 6))}
    dense = dense_gradients(model, task, batch)
    shapes = {n: tuple(g.shape[1:]) for n, g in dense.items()}
    end_to_end, together = Sketched(shapes, sketch), Sketched(shapes, sketch, together=True)
    found = Probe(model, task, reductions={"a": end_to_end, "b": together})(batch).reduced
    assert found["a"].shape == (len(batch[0]) if case == "network" else 3, end_to_end.size)
    total = torch.zeros(len(found["a"]), sketch.dim)
    for parameter, gradient in dense.items():
        want = sketch_of(gradient, sketch.named(parameter))
        total += want
        if gradient[0].numel() <= sketch.dim:
            want = gradient.flatten(1)  # kept as it is
        got = found["a"][:, end_to_end.place(parameter)]
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()) + 1e-7, msg=parameter)
    torch.testing.assert_close(found["b"], total, rtol=1e-3, atol=1e-5 * float(total.abs().max()))


def test_inner_products_are_unbiased_over_the_whole_model() -> None:
    model, batch = Network(), (torch.randint(9, (2, 7)), torch.randint(5, (2,)))
    dense = dense_gradients(model, Classification(), batch)
    exact = sum(float((g[0].double() * g[1].double()).sum()) for g in dense.values())
    shapes = {n: tuple(g.shape[1:]) for n, g in dense.items()}
    for together in (True, False):
        found = []
        for seed in range(50):
            reduction = Sketched(shapes, assay.Kronecker(3, 3, seed=seed), together)
            x, y = (
                Probe(model, Classification(), reductions={"x": reduction}, verify=False)(batch).reduced["x"].double()
            )
            found.append(float(x @ y))
        estimates = torch.tensor(found)
        assert abs(float(estimates.mean()) - exact) < 4 * float(estimates.std()) / 50**0.5


def test_a_parameter_that_the_batch_does_not_use_has_its_place() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.never, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x))

    model = Unused()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    reduction = Sketched(shapes, assay.Kronecker(2, 2))
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    found = Probe(model, Classification(), reductions={"x": reduction})(batch).reduced["x"]
    assert bool((found[:, reduction.place("never.weight")] == 0).all())
    assert bool((found[:, reduction.place("head.weight")] != 0).any())


def test_grad_sketch_and_project_agree() -> None:
    inputs, grads = torch.randn(3, 5, 7), torch.randn(3, 5, 6)
    dense = grads.mT @ inputs
    for sketch in (assay.Sparse(16), assay.Rademacher(16)):
        torch.testing.assert_close(grad_sketch(inputs, grads, sketch), project(dense.flatten(1), sketch))
