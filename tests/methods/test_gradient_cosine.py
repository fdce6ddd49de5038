"""The gradient cosine against autograd's gradients, multiplied out, in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import GradientCosine
from assay.methods.sums import cosines
from assay.methods.targets import TargetSet
from assay.tasks import Classification
from tests.methods.data import noisy_digits


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 10))


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(B, parameters), one sample at a time."""
    model = model.double()
    rows = []
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def test_equals_the_cosine_of_whole_gradients():
    data = noisy_digits(0.3, size=60)
    x, y = data.x[:40], data.given[:40]
    targets = {
        "a": [(data.x[40:47], data.true[40:47]), (data.x[47:50], data.true[47:50])],
        "b": [(data.x[50:], data.true[50:])],
    }
    method = GradientCosine(network(), Classification(), targets).fit()
    table = assay.score([(x[:30], y[:30]), (x[30:], y[30:])], [method])
    own = nn.functional.normalize(gradients(network(), x, y), dim=1)
    expected = []
    for name, rows in (("a", slice(40, 50)), ("b", slice(50, 60))):
        mean = gradients(network(), data.x[rows], data.true[rows]).mean(0)
        expected.append(own @ nn.functional.normalize(mean, dim=0))
        np.testing.assert_allclose(table[f"gradient_cosine_{name}"].to_numpy(), expected[-1], atol=2e-6)
    np.testing.assert_allclose(table["gradient_cosine"].to_numpy(), torch.stack(expected).mean(0), atol=2e-6)


def test_what_has_no_direction_is_refused():
    data = noisy_digits(0.3, size=10)
    with pytest.raises(ValueError, match="expected at least one target"):
        GradientCosine(network(), Classification(), {})
    with pytest.raises(ValueError, match="target 't' has no samples"):
        GradientCosine(network(), Classification(), {"t": []}).fit()
    even = nn.Linear(4, 2)
    even.load_state_dict({name: torch.zeros_like(p) for name, p in even.state_dict().items()})
    with pytest.raises(ValueError, match="the gradients of target 't' add up to 0"):
        GradientCosine(even, Classification(), {"t": [(torch.ones(2, 4), torch.arange(2))]}).fit()
    with pytest.raises(RuntimeError, match="call fit"):
        assay.score([(data.x, data.given)], [GradientCosine(network(), Classification(), {"t": [(data.x, data.true)]})])


class Wide(nn.Module):
    """A bare parameter; as the batch is large, used in a way that cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.known, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.shift, self.mix = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = (self.known(x) + self.shift).tanh()
        return self.head(torch.einsum("bi,io->bo", h, self.mix) if len(x) > 4 else h @ self.mix)


def samples(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def test_bare_parameters_count_like_any_other():
    x, y = samples(4)
    method = GradientCosine(Wide(), Classification(), {"t": [(x[:2], y[:2])]}).fit()
    own = nn.functional.normalize(gradients(Wide(), x, y), dim=1)
    mean = nn.functional.normalize(gradients(Wide(), x[:2], y[:2]).mean(0), dim=0)
    got = assay.score([(x, y)], [method])["gradient_cosine"].to_numpy()
    np.testing.assert_allclose(got, own @ mean, atol=2e-6)


def test_a_layer_that_is_left_out_while_scoring_is_no_part_of_the_target_either():
    target, pool = {"t": [samples(3)]}, samples(8)
    late = GradientCosine(Wide(), Classification(), target, skip_unsupported=True).fit()
    assert not late.left_out
    never = GradientCosine(Wide(), Classification(), target, layers=["*", "!mix"]).fit()
    got, want = (assay.score([pool], [method])["gradient_cosine"].to_numpy() for method in (late, never))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_what_is_beyond_float32_has_no_cosine():
    """‖g‖² overflows, or vanishes although g does not: 0 would say that g is 0."""
    (x, y), model = samples(4), nn.Linear(4, 3, bias=False)
    method = GradientCosine(model, Classification(), {"t": [(x, y)]}).fit()
    scaled = torch.stack([x[0], torch.zeros(4), x[2] * 1e25, x[3] * 1e-25])
    wrong = model(scaled).argmin(1)  # of large logits: the gradient is not 0
    got = assay.score([(scaled, wrong)], [method])["gradient_cosine"].to_numpy()
    assert np.isnan(got).tolist() == [False, False, True, True]
    assert got[1] == 0


def test_a_fit_that_fails_or_is_a_copys_changes_nothing():
    first, second = samples(3), samples(4)
    method = GradientCosine(Wide(), Classification(), {"a": [first], "b": [second]}).fit()
    want = assay.score([second], [method])
    other = copy.copy(method)
    other.targets = TargetSet(method.name, {"a": [second], "b": [first]})
    other.fit()
    assert assay.score([second], [method]).equals(want)
    broken = (torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.long))
    method.targets = TargetSet(method.name, {"a": [second], "b": [broken]})
    with pytest.raises(ValueError, match="target 'b' has no samples with a finite gradient: of 2, 0 have a loss"):
        method.fit()
    assert assay.score([second], [method]).equals(want)


def test_a_square_with_few_digits_left_makes_no_cosine():
    """1e-44 is one of the least seven numbers of float32."""
    squares, dots = torch.tensor([1e-44, 1e-36, 0.0, torch.inf]), torch.tensor([1e-22, 1e-18, 0.0, 1.0])
    torch.testing.assert_close(cosines(dots, squares), torch.tensor([torch.nan, 1, 0, torch.nan]), equal_nan=True)
