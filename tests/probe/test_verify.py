"""Wrong gradients are errors: by the checks on shapes, or by the comparison with autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_models import gpt2, llama, randomise, text_batch
from torch import Tensor, nn

from assay.probe import Probe, SqNorm, tapped_parameters
from assay.tasks import CausalLM, Classification


class FunctionallyTied(nn.Module):
    """The embedding's weight is used a second time where no hook can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return F.linear(self.body(self.embed(input_ids)).tanh(), self.embed.weight)


class TimeFirst(nn.Module):
    """Runs its layer on (T, B, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.transpose(0, 1)).tanh().sum(0))


class Coupled(nn.Module):
    """Standardises over the batch by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(((h - h.mean(0)) / h.std(0)).tanh())


class Overwrites(nn.Module):
    """Changes a layer's input after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.layer(x)
        x.zero_()
        return self.head(h)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.layer.forward = lambda x, scale: F.linear(x, self.layer.weight) * scale  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.mean())


def classes(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*shape).double(), torch.randint(3, (shape[-2] if len(shape) == 3 else shape[0],))


def test_a_weight_used_behind_the_layers_back() -> None:
    model = randomise(FunctionallyTied())
    batch = {"input_ids": torch.randint(7, (3, 5))}
    with pytest.raises(RuntimeError, match=r"parameter 'embed\.weight'.*F\.linear\(x, embedding\.weight\)"):
        Probe(model, CausalLM())(batch)
    Probe(model, CausalLM(), factors="body")(batch)  # the others are right


def test_time_first_layers_are_refused_by_shape() -> None:
    x, y = torch.randn(3, 5, 4).double(), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"'layer' \(Linear\).*\(5, 3, 4\).*batch of 3"):
        Probe(randomise(TimeFirst()), Classification(), verify=False)((x, y))


def test_time_first_layers_are_caught_even_where_the_shapes_agree() -> None:
    x, y = torch.randn(5, 5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
        Probe(randomise(TimeFirst()), Classification())((x, y))


def test_samples_that_influence_each_other() -> None:
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'.*influence each other"):
        Probe(randomise(Coupled()), Classification())(classes(5, 4))


def test_a_first_batch_of_one_does_not_settle_it() -> None:
    probe = Probe(randomise(TimeFirst()), Classification())
    probe((torch.randn(1, 1, 4).double(), torch.tensor([0])))
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
        probe((torch.randn(5, 5, 4).double(), torch.tensor([0, 1, 2, 0, 1])))


def test_a_batch_that_is_not_finite_does_not_settle_it() -> None:
    probe = Probe(randomise(Coupled()), Classification())
    x, y = classes(5, 4)
    probe((x * torch.nan, y))
    with pytest.raises(RuntimeError, match="influence each other"):
        probe((x, y))


def test_an_input_that_was_overwritten() -> None:
    for verify in (True, False):
        with pytest.raises(RuntimeError, match=r"modified.*in.?place"):
            Probe(randomise(Overwrites()), Classification(), verify=verify)(classes(5, 4))


def test_a_layer_with_more_than_one_input() -> None:
    with pytest.raises(RuntimeError, match=r"'layer' was called with \(Tensor, Tensor\)"):
        Probe(randomise(TwoInputs()), Classification(), verify=False)(classes(5, 4))


@pytest.mark.parametrize("positions", [5, 3])
def test_positions_without_a_batch_dimension(positions: int) -> None:
    """Ids of shape (T,), refused where T differs from B and caught by the check where it does not."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.embed(torch.arange(x.shape[1]))).tanh().mean(1))

    x, y = torch.randn(3, positions, 4).double(), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"'embed' \(Embedding\)|parameter 'embed\.weight'"):
        Probe(randomise(Positions()), Classification())((x, y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_no_false_alarms(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    # the bias of attention keys has gradient zero but for rounding: in Llama with attention biases it stands
    # alone
    model = make().to(dtype)
    for layer in getattr(getattr(model, "model", None), "layers", []):
        layer.self_attn.k_proj = nn.Linear(8, layer.self_attn.k_proj.out_features, dtype=dtype)
    names = tapped_parameters(model)
    signals = Probe(model, CausalLM(), reductions={"norm": SqNorm(names)})(text_batch(7, 3, 5, 2))
    assert signals.reduced["norm"].isfinite().all()


def test_cancelling_samples_raise_no_false_alarm() -> None:
    """The weighted sum is a hundred thousand times smaller than its terms, in float32."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(model.weight)  # the gradient of sample b is then plus or minus x_b / 2
    labels = torch.arange(64) % 2
    weights = 0.5 + torch.rand(64, generator=torch.Generator().manual_seed(0))  # those of the check
    signed = weights * (2 * labels - 1)
    scale = torch.ones(64)
    scale[-1] = (1e-5 - signed[:-1].sum()) / signed[-1]
    Probe(model, Classification())((torch.randn(4) * scale[:, None], labels))


def test_verify_can_be_turned_off() -> None:
    Probe(randomise(FunctionallyTied()), CausalLM(), verify=False)({"input_ids": torch.randint(7, (3, 5))})
