"""Wrong gradients are errors: by the checks on shapes, or by the comparison with autograd."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe import Probe, SqNorm, tapped_parameters
from assay.probe.summed import summed_gradient
from assay.probe.verify import signs
from assay.tasks import CausalLM, Classification, Margin
from assay.tasks.base import Outputs
from tests.probe.probe_oracle import close, jacobian
from tests.probe.test_models import gpt2, llama, randomise, text_batch


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


class Rolled(nn.Module):
    """Runs its layer on the samples in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.lift(x).tanh().roll(1, 0)).roll(-1, 0).tanh().sum(1))


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


def test_time_first_layers_are_refused_by_shape_where_nothing_is_checked() -> None:
    x, y = torch.randn(3, 5, 4).double(), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match=r"'layer' \(Linear\).*\(5, 3, 4\).*batch of 3"):
        Probe(randomise(TimeFirst()), Classification(), verify=False)((x, y))


def test_samples_that_influence_each_other() -> None:
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'.*influence each other"):
        Probe(randomise(Coupled()), Classification())(classes(5, 4))


class Swapped(nn.Module):
    """Runs its layer on the samples with two of them in each other's place."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__()
        self.lift, self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(len(x))
        order[[self.one, self.other]] = order[[self.other, self.one]]
        return self.head(self.layer(self.lift(x).tanh()[order])[order].tanh())


@pytest.mark.parametrize("size", [3, 4, 6])
def test_samples_of_one_sign_in_each_others_place(size: int) -> None:
    for sign in (1, -1):
        alike = torch.nonzero(signs(size) == sign).flatten().tolist()
        if len(alike) > 1:
            with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
                Probe(randomise(Swapped(*alike[:2])), Classification())(classes(size, 4))


def test_a_first_batch_of_one_does_not_settle_it() -> None:
    probe = Probe(randomise(Rolled()), Classification())
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


class Positions(nn.Module):
    """nanoGPT's: ids of shape (T,), spread over the batch by the sum."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(40, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.embed(torch.arange(x.shape[1]))
        return self.head(self.norm(self.mix(x + positions).tanh() * positions.sigmoid()).tanh().mean(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_positions_without_a_batch_dimension(dtype: torch.dtype, seed: int) -> None:
    """Right for every T, also where T is B by chance, and in any order of such batches."""
    torch.manual_seed(seed)
    model = Positions(dtype)
    names = tapped_parameters(model)
    batches = [(torch.randn(n, t, 8).to(dtype), torch.randint(3, (n,))) for n, t in ((6, 6), (6, 9), (4, 4), (1, 5))]
    for order in (batches, batches[::-1]):
        probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names})
        for x, y in order:
            check_norms(probe, model, (x, y))


class BatchSecond(nn.Module):
    """A layer that sees (T, B, D), from the start or after another."""

    def __init__(self, first: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.lift, self.layer, self.head = first, nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x.transpose(0, 1)) if self.first else self.lift(x).tanh().transpose(0, 1)
        return self.head(self.layer(h).tanh().sum(0))


def check_norms(probe: Probe, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Of a probe with a norm for each parameter."""
    found = probe(batch).reduced
    exact = jacobian(
        copy.deepcopy(model).double(),
        lambda run, b: F.cross_entropy(run(b[0].double()), b[1], reduction="none"),
        batch,
    )
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.2}[next(model.parameters()).dtype]
    for name in found:
        close(found[name], exact[name].square().flatten(1).sum(1), tolerance, name)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_batch_second_layers(seed: int, dtype: torch.dtype, first: bool) -> None:
    """Right for every T, also where it is B, a multiple of it or 1, and in any order of such batches."""
    torch.manual_seed(seed)
    model, size = BatchSecond(first, dtype), 3 + seed
    lengths = (size, size + 1, 2 * size, 1, size)
    batches = [(torch.randn(size, n, 4).to(dtype), torch.randint(3, (size,))) for n in lengths]
    for order in (batches, batches[::-1]):
        probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
        for batch in order:
            check_norms(probe, model, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_a_wrong_booking_never_passes_the_check(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    model, size = Rolled().to(dtype), 3 + seed
    batch = torch.randn(size, size, 4).to(dtype), torch.randint(3, (size,))
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
        Probe(model, Classification())(batch)


class Later(nn.Module):
    """Runs a second layer from some length on: on (T, B, D), or on the samples in another order."""

    def __init__(self, rolled: bool) -> None:
        super().__init__()
        self.rolled, self.lift, self.layer, self.head = rolled, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).tanh()
        if x.shape[1] > 3 and self.rolled:
            h = self.layer(h.roll(1, 0)).tanh().roll(-1, 0)
        elif x.shape[1] > 3:
            h = self.layer(h.transpose(0, 1)).tanh().transpose(0, 1)
        return self.head(h.sum(1))


@pytest.mark.parametrize("rolled", [True, False])
def test_a_layer_that_runs_in_a_later_batch_first_is_checked_then(rolled: bool) -> None:
    torch.manual_seed(0)
    model, labels = Later(rolled), torch.tensor([0, 1, 2, 0, 1])
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    probe((torch.randn(5, 3, 4), labels))
    probe((torch.randn(5, 3, 4), labels))
    batch = torch.randn(5, 5, 4), labels
    if not rolled:
        check_norms(probe, model, batch)
        return
    with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
        probe(batch)


@pytest.mark.parametrize("rolled", [True, False])
def test_a_shape_that_hides_a_wrong_booking_is_checked_when_it_comes(rolled: bool) -> None:
    """The layer's input is (B, T, D) but for T = 4, where it is turned round, or in another order."""

    class Turned(Later):
        def forward(self, x: Tensor) -> Tensor:
            h = self.lift(x).tanh()
            if x.shape[1] != 4:
                return self.head(self.layer(h).sum(1))
            if self.rolled:
                return self.head(self.layer(h.roll(1, 0)).roll(-1, 0).sum(1))
            return self.head(self.layer(h.transpose(0, 1)).sum(0))

    torch.manual_seed(0)
    model, labels = Turned(rolled), torch.tensor([0, 1, 2, 0])
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    for length in (3, 5, 3):
        probe((torch.randn(4, length, 4), labels))
    if rolled:
        with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
            probe((torch.randn(4, 4, 4), labels))
        return
    for length in (4, 5, 4, 3):
        check_norms(probe, model, (torch.randn(4, length, 4), labels))


def test_the_check_repeats_where_something_is_new_and_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    import assay.probe.probe as module

    checks: list[int] = []
    prepare = module.prepare_check
    monkeypatch.setattr(module, "prepare_check", lambda *rest: (checks.append(1), prepare(*rest))[1])
    probe = Probe(gpt2(), CausalLM())
    for lengths in ((7, 3, 5), (6, 3, 5), (7, 7), (5,), (9, 2, 4, 4)):
        probe(text_batch(*lengths))
    assert len(checks) == 3  # of the first, second and fourth
    probe(text_batch(4, 4, 4, 4))  # T = B
    probe(text_batch(3, 3, 3))
    assert len(checks) == 4
    for _ in range(8, 17):
        probe(text_batch(6, 3, 5))
    assert len(checks) == 6


@pytest.mark.parametrize("size", range(1, 40))
def test_the_checks_weights_are_as_many_of_either_sign(size: int) -> None:
    weights = signs(size)
    assert set(weights.tolist()) <= {-1.0, 1.0}
    assert abs(float(weights.sum())) == size % 2
    assert torch.equal(weights, signs(size))


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
    signed = signs(64) * (2 * labels - 1)  # with the weights of the check
    scale = torch.ones(64)
    scale[-1] = (1e-5 - signed[:-1].sum()) / signed[-1]
    Probe(model, Classification())((torch.randn(4) * scale[:, None], labels))


def test_verify_can_be_turned_off() -> None:
    Probe(randomise(FunctionallyTied()), CausalLM(), verify=False)({"input_ids": torch.randint(7, (3, 5))})


def test_the_reading_that_is_checked_is_the_one_that_is_booked() -> None:
    """Factors are the first reading's, also where only another one has reductions."""
    torch.manual_seed(0)
    model, task, (x, y) = Positions(torch.float64), Classification(), classes(6, 6, 8)  # T = B: read twice
    norms = {"norm": SqNorm(tapped_parameters(model))}
    loss, margin = Probe(model, task, factors="head", readings=[(Margin(task), norms)]).read((x, y))
    factors = loss.factors["head"]
    F.cross_entropy(model(x), y, reduction="sum").backward()
    close(torch.einsum("bto,bti->oi", factors.grads, factors.inputs), model.head.weight.grad, 1e-9, "head")
    alone = Probe(model, Margin(task), reductions=norms)((x, y))
    close(margin.reduced["norm"], alone.reduced["norm"], 1e-9, "norm")


@pytest.mark.parametrize("scale", [1e-28, 1e28])
def test_gradients_whose_squares_are_beyond_their_type_raise_no_false_alarm(scale: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3, bias=False), torch.randn(8, 4) * scale
    y = model(x).argmin(1)
    Probe(model, Classification(), factors="*")((x, y))

    class Wrong(nn.Module):
        """Uses a weight of a layer twice, once behind its back."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + F.linear(x.flip(1), self.layer.weight)

    with pytest.raises(RuntimeError, match="do not add up to autograd's gradient"):
        Probe(Wrong(), Classification(), factors="*")((x, y))


def _spoilt(size: int) -> tuple[Positions, tuple[Tensor, Tensor], Tensor]:
    """T = B, where the positions could be samples, and a sample that is not finite."""
    torch.manual_seed(0)
    x, y = torch.randn(size, size, 8).double(), torch.arange(size) % 3
    x[1] = torch.nan
    return Positions(torch.float64), (x, y), torch.arange(size) != 1


def test_a_sample_that_is_not_finite_does_not_hide_a_wrong_booking() -> None:
    model, (x, y), fine = _spoilt(6)
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    found = probe((x, y)).reduced
    exact = jacobian(model, lambda run, b: F.cross_entropy(run(b[0]), b[1], reduction="none"), (x[fine], y[fine]))
    for name, gradient in exact.items():
        close(found[name][fine], gradient.square().flatten(1).sum(1), 1e-9, name)
        assert not found[name][1].isfinite()
    check_norms(probe, model, (x.nan_to_num(), y))


def test_where_no_check_can_be_made_a_guess_is_refused() -> None:
    model, batch, _ = _spoilt(2)  # the other sample's sign is not this one's
    with pytest.raises(RuntimeError, match=r"layer 'embed': by its shape .* more ways than one.*one by one"):
        Probe(model, Classification())(batch)
    x, y = batch
    assert not Probe(model, Classification())((x * torch.nan, y)).losses.isfinite().any()
    assert Probe(model, Classification())((x[:1, :1], y[:1])).losses.isfinite().all()


def test_after_a_batch_that_is_not_finite_a_layer_may_still_be_left_out() -> None:
    class Certain(Coupled):
        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x[:, None])[:, 0]
            return self.head(((h - h.mean(0)) / h.std(0)).tanh())

    probe = Probe(randomise(Certain()), Classification(), skip_unsupported=True)
    x, y = classes(5, 4)
    probe((x * torch.nan, y))
    probe((x, y))
    assert set(probe.left_out) == {"layer.weight", "layer.bias"}


class Followed(nn.Module):
    """A weight behind its layer's back, and positions: ``shape`` T = B leaves a choice. Counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.embed, self.head = nn.Linear(4, 4), nn.Embedding(9, 4), nn.Linear(4, 3)
        self.alive: list[weakref.ref[Callable[[Tensor], None]]] = []
        self.most, self.runs, self.fails = 0, 0, dict[int, Exception]()

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.runs in self.fails:
            raise self.fails[self.runs]
        if self.alive:
            gc.collect()
        self.most = max(self.most, sum(mark() is not None for mark in self.alive))
        h = F.linear(x, self.lift.weight) * self.lift.bias + self.embed(torch.arange(x.shape[1]))
        if h.requires_grad and gc.get_freeze_count():

            def mark(grads: Tensor) -> None: ...

            h.register_hook(mark)
            self.alive.append(weakref.ref(mark))
        return self.head(h.tanh().sum(1))


def test_a_weight_behind_its_layers_back_is_followed_where_a_layout_is_to_be_found_too() -> None:
    model, y = randomise(Followed()), torch.arange(5) % 3
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    gc.freeze()  # what other tests have left is not looked at
    try:
        probe((torch.randn(5, 5, 4).double(), y))
    finally:
        gc.unfreeze()
    model.alive.clear()
    assert model.runs > 4
    assert model.most == 0  # of the graphs of the runs before
    for length in (5, 3):
        check_norms(probe, model, (torch.randn(5, length, 4).double(), y))


@pytest.mark.parametrize("run", [4, 6])  # the followed run, and the one with another layout
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), RuntimeError("DefaultCPUAllocator: not enough"), ValueError("no")]
)
def test_an_error_on_the_way_to_the_right_reading_is_passed_on_and_changes_nothing(run: int, error: Exception) -> None:
    model, batch = randomise(Followed()), (torch.randn(5, 5, 4).double(), torch.arange(5) % 3)
    model.fails = {run: error}
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    with pytest.raises(type(error), match=str(error)):
        probe(batch)
    assert model.runs == run
    model.fails = {}
    check_norms(probe, model, batch)


def test_a_layer_that_samples_and_a_constant_share() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
            self.register_buffer("constant", torch.randn(7, 4).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).tanh() * self.layer(self.constant).mean(0))

    model = randomise(Both())
    probe = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in tapped_parameters(model)})
    for size in (4, 5, 4):
        check_norms(probe, model, (torch.randn(size, 4).double(), torch.arange(size) % 3))


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def test_a_hook_that_changes_autograds_gradient_is_named() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), (torch.randn(6, 4), torch.randint(3, (6,)))
    model[1].weight.register_hook(lambda gradient: None)  # looks at it
    Probe(model, Classification(), factors="*")(batch)
    model[0].weight.register_hook(halved)
    expected = (
        r"'0\.weight'.* Likely causes: a hook on it \(halved; Tensor\.register_hook\) changes autograd's gradient"
    )
    with pytest.raises(RuntimeError, match=expected):
        Probe(model, Classification(), factors="*")(batch)
    Probe(model, Classification(), factors="*", verify=False)(batch)


class Sorting(nn.Module):
    """Runs its samples in the order of their first number, and gives them back in theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        out: Tensor = self.last(self.first(x[order]).tanh()[order.argsort()])
        return out


@pytest.mark.parametrize(("in_order", "found"), [(1, 2), (3, 4), (10, 16)])
def test_an_order_that_follows_from_the_data_is_found_before_as_many_batches_again(in_order: int, found: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    x = x[x[:, 0].argsort()]
    probe = Probe(Sorting(), Classification())
    for _ in range(in_order):
        probe((x, y))
    for _ in range(in_order + 1, found):
        probe((x.flip(0), y))
    with pytest.raises(RuntimeError, match=r"'first.weight': the probe's per-sample gradients do not add up"):
        probe((x.flip(0), y))


@dataclass(frozen=True)
class Own(Classification):
    """A user's task: ``made`` of the cross entropies."""

    made: Callable[[Tensor], Tensor] = torch.clone

    def forward(self, model: nn.Module, batch: Any) -> Outputs:
        return Outputs(self.made(F.cross_entropy(model(batch[0]), batch[1], reduction="none")))


@pytest.mark.parametrize("made", [torch.detach, lambda losses: torch.tensor(losses.tolist())])
def test_losses_without_a_graph_have_no_gradients_of_0(made: Callable[[Tensor], Tensor]) -> None:
    model, batch, task = nn.Linear(4, 3), classes(5, 4), Own(made=made)
    with pytest.raises(RuntimeError, match=r"Own: its losses have no graph.*every gradient would be 0.*detach\(\)"):
        Probe(model.double(), task, reductions={"n": SqNorm(["weight"])})(batch)
    with pytest.raises(RuntimeError, match="Own: its losses have no graph"):
        summed_gradient(model, task, batch, ["weight"])


def test_what_the_losses_do_not_depend_on_has_a_gradient_of_0() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 3), "other": nn.Linear(4, 3)}).double()
    model.forward = lambda x: model["head"](x) + model["other"](x).detach()
    found = Probe(model, Own(), reductions={"n": SqNorm(["other.weight"])})(classes(5, 4)).reduced["n"]
    assert found.tolist() == [0] * 5


@pytest.mark.parametrize("made", [torch.mean, lambda losses: losses[:, None], lambda losses: losses[1:]])
def test_losses_that_are_not_one_per_sample(made: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"Own: losses of shape \(.*\); expected \(5,\)"):
        Probe(nn.Linear(4, 3).double(), Own(made=made), reductions={"n": SqNorm(["weight"])})(classes(5, 4))
