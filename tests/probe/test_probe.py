"""The probe's contract: what is selected, what is left alone, what a batch may not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import assay.probe.recording as recording
from assay.probe import Dot, PerSampleGradient, Probe, SqNorm, tapped_parameters
from assay.tasks import CausalLM, Classification
from tests.probe.probe_oracle import close, random_direction, state
from tests.probe.test_models import Block, ResNet, gpt2, llama, randomise, text_batch


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Dropout(), nn.Linear(5, 3)).double()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 4).double(), torch.randint(3, (size,))


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# ---- selection


def test_globs_select_by_layer_and_by_parameter() -> None:
    model = Headed()
    assert tapped_parameters(model) == ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert tapped_parameters(model, "head") == ["head.weight", "head.bias"]
    assert tapped_parameters(model, "head.*") == ["head.weight", "head.bias"]
    assert tapped_parameters(model, "head.weight") == ["head.weight"]
    assert tapped_parameters(model, ["*.bias", "body.*"]) == ["body.0.weight", "body.0.bias", "head.bias"]
    assert tapped_parameters(model, ()) == []


def test_a_tied_weight_is_selected_by_any_of_its_names() -> None:
    model = gpt2()
    assert tapped_parameters(model, "lm_head") == ["transformer.wte.weight"]
    with Probe(model, CausalLM(), factors="lm_head.*") as probe:
        signals = probe(text_batch(4, 3))
    assert set(signals.factors) == {"lm_head", "transformer.wte"}  # both uses, or the gradient would be wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"factors": "haed.*"}, r"'haed\.\*' matches no layer and no parameter; nearest: .*'head"),
        ({"factors": ["head", "tail"]}, "'tail' matches no"),
        ({"embeddings": "nothing"}, "'nothing' matches no layer; nearest"),
        ({"embeddings": "body.*"}, "matches 2 layers: 'body.0', 'body.1'"),
        (
            {"reductions": {"norm": SqNorm(["head.weigth"])}},
            r"no parameter 'head\.weigth'; nearest: 'head\.weight'",
        ),
        ({"reductions": {"norm": SqNorm([])}}, "'norm' names no parameter"),
    ],
)
def test_names_that_match_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe(Headed(), Classification(), **arguments)


def test_frozen_parameters_are_not_tapped() -> None:
    model = Headed()
    model.body.requires_grad_(False)
    probe = Probe(model, Classification())
    assert probe.parameters == ["head.weight", "head.bias"]
    assert probe.coverage == 1.0
    with pytest.raises(ValueError, match=r"'body\.\*' matches only frozen parameters"):
        Probe(model, Classification(), factors="body.*")
    with pytest.raises(ValueError, match=r"'body\.0\.bias' is frozen"):
        Probe(model, Classification(), reductions={"norm": SqNorm(["body.0.bias"])})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Probe(model, Classification())
    assert Probe(model, Classification(), factors=()).coverage == 0.0


def test_another_name_of_a_tied_parameter_is_explained() -> None:
    with pytest.raises(ValueError, match=r"another name of 'transformer\.wte\.weight'"):
        Probe(gpt2(), CausalLM(), reductions={"norm": SqNorm(["lm_head.weight"])})


def test_coverage_counts_elements_once() -> None:
    model = Headed()  # 24 + 6 in the body, 18 + 3 in the head
    assert Probe(model, Classification(), factors="head.*").coverage == 21 / 51
    assert Probe(model, Classification(), reductions={"norm": SqNorm(["head.weight"])}).coverage == 18 / 51
    assert Probe(gpt2(tied=True), CausalLM()).coverage == 1.0
    model.odd = nn.Bilinear(2, 2, 3)  # 12 + 3
    with pytest.raises(ValueError, match=r"'odd' \(Bilinear\)"):
        Probe(model, Classification())
    assert Probe(model, Classification(), skip_unsupported=True).coverage == 51 / 66


# ---- what runs


def test_without_taps_there_is_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backward pass ran")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    signals = Probe(mlp(), Classification(), factors=())(batch())
    assert signals.losses.shape == (5,)
    assert signals.logits is not None
    assert not signals.logits.requires_grad
    assert not signals.factors


def test_backward_stops_at_the_earliest_tapped_layer() -> None:
    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            passed.append(True)
            return grads[0]

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Watch.apply(x)

    passed: list[bool] = []
    model = nn.Sequential(nn.Linear(4, 4), Watched(), nn.Linear(4, 3)).double()
    Probe(model, Classification(), factors="2", verify=False)(batch())
    assert not passed
    Probe(model, Classification(), factors="0", verify=False)(batch())
    assert passed


def test_no_weight_gradient_is_computed() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            asked.append(ctx.needs_input_grad)
            ctx.save_for_backward(weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return grads[0] @ ctx.saved_tensors[0].T, None

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6).double())

        def forward(self, x: Tensor) -> Tensor:
            return Product.apply(x, self.weight)

    asked: list[tuple[bool, bool]] = []
    model = nn.Sequential(nn.Linear(4, 6), Bare(), nn.Linear(6, 3)).double()
    Probe(model, Classification(), factors="0", verify=False)(batch())
    assert asked == [(True, False)]


def test_reductions_run_inside_the_backward_pass_and_free_what_they_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    watch = recording.Recorder._watch

    def spy(self: Any, call: Any, output: Tensor) -> None:
        watch(self, call, output)
        calls.append(call)

    class Order:
        parameters = tapped_parameters(mlp(), "*.weight")
        seen: tuple[str, ...] = ()

        def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
            held = [call.tap.layer for call in calls if call.grads is not None]
            assert held == [parameter.partition(".")[0]]  # later layers are folded and free, earlier not yet there
            self.seen += (parameter,)
            return gradient.sqnorm()

    monkeypatch.setattr(recording.Recorder, "_watch", spy)
    order = Order()
    Probe(mlp(), Classification(), reductions={"order": order}, verify=False)(batch())
    assert order.seen == ("4.weight", "2.weight", "0.weight")
    assert all(call.inputs.numel() == 0 for call in calls)


def test_reductions_keep_no_factors_unless_asked() -> None:
    reductions = {"norm": SqNorm(["0.weight"])}
    assert not Probe(mlp(), Classification(), reductions=reductions)(batch()).factors
    kept = Probe(mlp(), Classification(), reductions=reductions, factors="4")(batch()).factors
    assert set(kept) == {"4"}
    assert set(Probe(mlp(), Classification())(batch()).factors) == {"0", "2", "4"}


def test_a_reduction_of_the_wrong_shape_is_named() -> None:
    class Whole:
        parameters = ("0.weight",)

        def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
            return gradient.dense()

    with pytest.raises(ValueError, match=r"'whole' gave shape \(5, 6, 4\) for parameter '0\.weight'; expected \(5,\)"):
        Probe(mlp(), Classification(), reductions={"whole": Whole()})(batch())


def test_a_direction_of_the_wrong_shape_is_named() -> None:
    direction = {"0.weight": torch.zeros(4, 6).double()}
    with pytest.raises(ValueError, match=r"0\.weight: direction of shape \(4, 6\); expected \(6, 4\)"):
        Probe(mlp(), Classification(), reductions={"dot": Dot(direction)})(batch())


# ---- the model is left as it was


class Fails(nn.Module):
    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.inner = when, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.when == "forward":
            raise ArithmeticError("deliberate")
        if h.requires_grad and self.when == "backward":
            h.register_hook(self.fail)
        return h

    def fail(self, grads: Tensor) -> None:
        raise ArithmeticError("deliberate")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("when", ["never", "forward", "backward"])
def test_the_model_is_as_it_was_also_after_an_exception(when: str, verify: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Fails(when), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 3)).double()
    model.train()
    model[2].eval()  # a mixture of modes, gradients, and hooks of somebody else
    model[1].inner.bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    handles = [
        model[0].register_forward_hook(lambda *_: None),
        model[4].register_forward_pre_hook(lambda *_: None),
    ]
    before, statistics = state(model), model[2].running_mean.clone()
    probe = Probe(model, Classification(), verify=verify)
    if when == "never":
        probe(batch())
    else:
        with pytest.raises(ArithmeticError, match="deliberate"):
            probe(batch())
    after = state(model)
    assert str(before) == str(after)
    assert model[0].weight.grad is before[0][2]
    assert torch.equal(model[2].running_mean, statistics)
    for handle in handles:
        handle.remove()


def test_training_goes_on_between_calls() -> None:
    model = mlp().train()
    probe = Probe(model, Classification(), factors="4")
    first = probe(batch())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimiser.step()
    assert not torch.equal(probe(batch()).losses, first.losses)


def test_batches_that_require_gradients_get_none() -> None:
    x, y = batch()
    x.requires_grad_()
    expected = Probe(mlp(), Classification())((x.detach(), y))
    found = Probe(mlp(), Classification())((x, y))
    assert x.grad is None
    assert torch.equal(found.factors["0"].grads, expected.factors["0"].grads)


def test_inside_inference_mode_gradients_still_flow() -> None:
    expected = Probe(mlp(), Classification())(batch()).factors["0"].grads
    model = mlp()
    with torch.inference_mode():
        found = Probe(model, Classification())(batch()).factors["0"].grads
    assert torch.equal(found, expected)


# ---- a sample's signals are its own


def test_a_sample_alone_equals_the_sample_in_a_padded_batch() -> None:
    model = gpt2()
    names = tapped_parameters(model)
    reductions = {"dot": Dot(random_direction(model, names)), "norm": SqNorm(names)}
    probe = Probe(model, CausalLM(), reductions=reductions, embeddings="lm_head")
    lengths = (7, 3, 5)
    whole = text_batch(*lengths)
    together = probe(whole)
    assert together.embeddings is not None
    for b, length in enumerate(lengths):
        alone = probe({name: value[b : b + 1, :length] for name, value in whole.items()})
        assert alone.embeddings is not None
        close(together.losses[b : b + 1], alone.losses, 1e-6, "losses are float32")
        close(together.embeddings[b : b + 1], alone.embeddings, 1e-6, "embeddings are float32")
        for key in reductions:
            close(together.reduced[key][b : b + 1], alone.reduced[key], 1e-9, key)


def test_the_order_of_a_batch_does_not_matter() -> None:
    model = randomise(ResNet())
    names = tapped_parameters(model)
    probe = Probe(model, Classification(), reductions={"norm": SqNorm(names)})
    x, y = torch.randn(4, 2, 9, 9).double(), torch.tensor([0, 1, 2, 0])
    order = torch.tensor([2, 0, 3, 1])
    close(probe((x, y)).reduced["norm"][order], probe((x[order], y[order])).reduced["norm"], 1e-10, "norm")


def test_dots_sum_to_the_gradient_of_the_summed_loss() -> None:
    model = llama()
    names = tapped_parameters(model)
    direction = random_direction(model, names)
    signals = Probe(model, CausalLM(), reductions={"dot": Dot(direction)})(text_batch(6, 4))
    total = CausalLM().forward(model, text_batch(6, 4)).losses.sum()
    gradients = torch.autograd.grad(total, [dict(model.named_parameters())[n] for n in names])
    expected = sum((g * direction[n]).sum() for n, g in zip(names, gradients, strict=True))
    close(signals.reduced["dot"].sum(), torch.as_tensor(expected), 1e-5, "sum")


def test_a_text_with_nothing_to_predict_has_loss_nan_and_gradient_zero() -> None:
    model = gpt2()
    names = tapped_parameters(model)
    probe = Probe(model, CausalLM(), reductions={"norm": SqNorm(names)})
    signals = probe(text_batch(6, 1, 0, 4))
    assert signals.losses.isnan().tolist() == [False, True, True, False]
    assert (signals.reduced["norm"] == 0).tolist() == [False, True, True, False]
    assert signals.reduced["norm"].isfinite().all()


def test_one_broken_sample_harms_nobody_else() -> None:
    x, y = batch()
    x[2] = torch.nan
    probe = Probe(mlp(), Classification(), reductions={"norm": SqNorm(["0.weight", "4.bias"])})
    found, clean = probe((x, y)).reduced["norm"], probe(batch()).reduced["norm"]
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


# ---- embeddings and logits


def test_embeddings_average_the_real_positions() -> None:
    model, texts = gpt2().eval(), text_batch(5, 2)
    with Probe(model, CausalLM(), factors=(), embeddings="lm_head", logits=False) as probe:
        signals = probe(texts)
    assert signals.logits is None
    assert signals.embeddings is not None
    hidden = model.transformer(**texts).last_hidden_state
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)]).detach()
    close(signals.embeddings, expected, 1e-6, "embeddings are float32")


def test_embeddings_of_an_image_model_are_the_layers_input() -> None:
    model, x = Headed(), torch.randn(5, 4)
    signals = Probe(model, Classification(), factors=(), embeddings="head")((x, torch.zeros(5).long()))
    assert torch.equal(signals.embeddings, model.body(x).detach())


def test_embeddings_of_feature_maps_are_refused() -> None:
    model = randomise(nn.Sequential(Block(nn.Identity(), nn.GroupNorm(2, 8)), nn.Flatten(), nn.LazyLinear(3)))
    x = torch.randn(2, 4, 3, 3).double()
    model(x)
    with pytest.raises(RuntimeError, match=r"layer '1' has shape \(2, 4, 3, 3\)"):
        Probe(model, Classification(), factors=(), embeddings="1")((x, torch.tensor([0, 1])))
