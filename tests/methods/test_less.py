"""LESS: a cosine of Adam steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import assay
from assay.methods import LESS, AdamState
from assay.methods.less import AdamSketched
from assay.probe import Dense, PerSampleGradient
from assay.tasks import Classification
from tests.methods.small_problem import EXACT, POOL, gradients, run, split


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
                        dict(model.named_parameters()), split(model, gradients(model, *pool)), strict=True
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
    from assay.probe import Sketched

    if target:
        return Sketched(method.shapes, method.sketch)

    class Exact(AdamSketched):
        def __call__(self, parameter, gradient):
            return self.state.step(parameter, gradient.dense(), self.eps).flatten(1)

    return Exact(method.shapes, method.sketch, False, state=method.optimizers[k], eps="outside")


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


@pytest.mark.parametrize("lead", [5.0, 40.0])
def test_the_gradient_of_a_sure_sample_has_a_direction_too(lead: float) -> None:
    """Its length is about e to the minus lead."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 0.5], [-1.0, 2.0]]), torch.tensor([0, 1])
    model.weight.data = torch.tensor([[lead, 0.0], [0.0, lead / 2]])
    got = run(LESS([model], Classification(), {"a": [(x[:1], y[:1])]}, optimizers=None, sketch=EXACT), (x, y))["less"]
    assert float(got[0]) == pytest.approx(1, abs=1e-5)


def test_a_parameter_that_no_sample_of_a_batch_reaches_is_moved_as_in_company() -> None:
    moments = [torch.rand(2, 3, dtype=torch.float64) for _ in range(2)]
    state = AdamState({"w": moments[0]}, {"w": moments[1]})
    feature = AdamSketched({"w": (2, 3)}, EXACT, True, state=state, eps="outside")
    in_company = feature("w", PerSampleGradient(torch.Size((2, 3)), [Dense(torch.zeros(1, 2, 3, dtype=torch.float64))]))
    assert torch.equal(feature.at_zero("w"), in_company[0])
