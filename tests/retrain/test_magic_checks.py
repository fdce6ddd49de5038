"""What has no derivative, or a wrong one, is refused before anything is spent, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from assay.retrain import SGD, Adam, Diverged, Training, magic, metasmoothness, optimizer_of
from assay.tasks import CausalLM, Classification
from tests.retrain.test_magic import N, losses, network, world


def refused(words: str, **changes: Any) -> None:
    training, targets, _ = world(SGD(0.1))
    with pytest.raises(ValueError, match=words):
        magic(replace(training, **changes), targets, directions=0)


def test_batch_normalisation_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    refused(r"batch normalisation in train mode, or without running statistics \(1\)", model=model)
    always = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    refused("without running statistics", model=always.double().eval())
    training, targets, _ = world(SGD(0.1))
    assert magic(replace(training, model=model.eval()), targets, directions=0).scores[:5].isfinite().all()


def test_randomness_that_no_module_owns_to() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.dropout(losses(model, batch), 0.5)

    refused("gives other numbers when it is made twice", losses=noisy)


def test_buffers_that_a_pass_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x)

    model = Counting()
    refused(r"changes its buffers \(calls\)", model=model)
    assert float(model.calls) == 0


class _Once(torch.autograd.Function):
    """x² whose gradient forgets that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(2 * x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        return outer * ctx.saved_tensors[0].detach()


def test_second_derivatives_that_are_silently_wrong() -> None:
    def wrong(model: nn.Module, batch: Any) -> Tensor:
        return _Once.apply(model(batch[0])).sum(1)

    refused("_Once has a gradient whose own derivative is wrong", losses=wrong)

    class Kinked(_Once):
        """The same where kinks hide it."""

    def hidden(model: nn.Module, batch: Any) -> Tensor:
        return Kinked.apply((300 * model(batch[0])).frac()).sum(1)

    training, targets, _ = world(SGD(1e-4))
    found = magic(replace(training, losses=hidden), targets, directions=0)
    assert found.warnings[0] == "whether the gradient of Kinked has a right derivative could not be seen, for kinks"


def test_gradients_that_depend_on_what_is_cut_off_from_them() -> None:
    def focal(model: nn.Module, batch: Any) -> Tensor:
        each = losses(model, batch)
        return each * (1 - torch.exp(-each)).detach() ** 2

    refused("the derivative of their gradient is wrong: .* cut off from it \\(detach", losses=focal)

    def kinked(model: nn.Module, batch: Any) -> Tensor:
        return focal(model, batch) + 1e-9 * model(batch[0]).abs().sum(1)

    training, targets, _ = world(SGD(0.1))
    found = magic(replace(training, losses=kinked), targets, directions=0)
    assert "for kinks alone, or something that the gradient depends on is cut off" in found.warnings[0]


def test_what_is_computed_again_in_the_backward_pass() -> None:
    """The step's parameters have left the model by then: a checkpointed layer would run with those of the start."""

    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.utils.checkpoint.checkpoint(lambda h: self[1](self[0](h)), x, use_reentrant=False)
            return self[2](first)

    refused("model: 0 runs again during the backward pass", model=Checkpointed(*network()))
    kinked = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    refused("model: 0 runs again during the backward pass", model=Checkpointed(*kinked).double())


def test_randomness_while_the_rate_is_still_0() -> None:
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.dropout(losses(model, batch), 0.5)

    refused("gives other numbers when it is made twice", losses=noisy, optimizer=SGD([0.0] + [0.1] * 7))


def test_losses_that_become_others_on_the_way() -> None:
    calls: list[int] = []

    def later(model: nn.Module, batch: Any) -> Tensor:
        calls.append(0)
        return losses(model, batch) * (1.5 if len(calls) > 20 else 1)

    training, targets, _ = world(SGD(0.1))
    with pytest.raises(RuntimeError, match=r"step \d leads elsewhere than when it was made"):
        magic(replace(training, losses=later), targets, target_losses=losses, checkpoints=50, directions=0)


def test_a_target_whose_loss_is_random() -> None:
    training, targets, _ = world(SGD(0.1))
    with pytest.raises(RuntimeError, match=r"target 'b': its loss was .* is random"):
        magic(
            training,
            {"b": targets["b"]},
            target_losses=lambda model, batch: losses(model, batch) * torch.rand(()),
            directions=0,
        )


def test_losses_of_another_model() -> None:
    other = network(3)
    refused("do not depend on the model's trained parameters", losses=lambda model, batch: losses(other, batch))
    refused("the first step has no gradient", losses=lambda model, batch: losses(model, batch).detach())
    refused(
        "losses are finite, and their gradient is not",
        losses=lambda model, batch: (0 * model(batch[0])[:, 0]).sqrt(),
    )


def test_numbers_of_16_bits_are_told_of() -> None:
    def half(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(lambda x: model(x).float(), batch)

    training, targets, _ = world(SGD(0.1))
    x, y = training.data
    single = replace(training, model=network().float(), data=(x.float(), y), losses=half)
    found = magic(single, {"a": [(a.float(), b) for a, b in targets["a"]]}, target_losses=losses, directions=0)
    assert "part of the losses is computed in torch.bfloat16" in found.warnings[0]


def test_second_derivatives_that_are_not_there() -> None:
    class Final(_Once):
        @staticmethod
        def backward(ctx: Any, outer: Tensor) -> Tensor:
            return torch.mul(outer, ctx.saved_tensors[0], out=torch.empty_like(outer))

    refused(
        "the first step's gradient cannot be differentiated",
        losses=lambda model, batch: Final.apply(model(batch[0])).sum(1),
    )


def test_kinks_are_let_pass_and_linear_losses_too() -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    training, targets, _ = world(SGD(0.1))
    training = replace(training, model=model, data=(training.data[0].float(), training.data[1]))
    single = {"t": [(targets["a"][0][0].float(), targets["a"][0][1])]}
    assert magic(training, single, directions=0).scores[:5].isfinite().all()
    flat = replace(training, model=nn.Linear(3, 1), losses=lambda m, batch: m(batch[0])[:, 0])
    assert magic(flat, single, directions=0).scores[:5].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batches": []}, "batches: expected one at least"),
        ({"batches": [[0], []]}, r"batches\[1\]: expected row numbers"),
        ({"batches": [[0, N]]}, f"row {N} lies outside the data's 0..{N - 1}"),
        ({"batches": [[-1]]}, "row -1 lies outside"),
        ({"batches": [[0.5]]}, r"batches\[0\]: expected row numbers, .* got float64"),
        ({"optimizer": SGD([0.1, 0.2])}, "one for each of the 8 steps, got 2"),
        ({"optimizer": SGD(0.1, undecayed=["head.*"])}, r"undecayed: 'head\.\*' names none"),
        ({"model": network().requires_grad_(False)}, "none of its parameters requires a gradient"),
        ({"model": network().to(torch.bfloat16)}, "are torch.bfloat16.*model.float"),
        ({"model": nn.Sequential(network(), nn.Linear(2, 2))}, "parameters of one type"),
        ({"clip": 0}, "clip: expected a finite number above 0"),
        ({"rows_at_once": 0}, "rows_at_once: expected an integer of at least 1"),
        ({"dropout_seed": -1}, "dropout_seed: expected an integer of at least 0"),
        ({"data": (torch.zeros(3), torch.zeros(4))}, "columns of one length"),
        ({"data": lambda rows: rows}, "samples: expected the number of samples"),
        ({"samples": 7}, f"samples: expected {N}, as many as data has"),
    ],
)
def test_runs_that_are_none(changes: dict[str, Any], words: str) -> None:
    training, _, _ = world(SGD(0.1))
    with pytest.raises(ValueError, match=words):
        replace(training, **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SGD(-0.1), "lr: expected a finite number of at least 0, got -0.1"),
        (lambda: SGD([0.1, float("nan")]), "lr: .* got nan"),
        (lambda: SGD("0.1"), "lr: expected a number, or a sequence"),
        (lambda: SGD(0.1, nesterov=True), "nesterov: expected a momentum"),
        (lambda: SGD(0.1, undecayed="bias"), "undecayed: expected a sequence of globs"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), "betas: expected a number from 0 to below 1, got 1.0"),
        (lambda: Adam(0.1, eps=0, eps_root=0), "eps and eps_root are both 0"),
        (lambda: Adam(0.1, weight_decay=float("inf")), "weight_decay: .* got inf"),
    ],
)
def test_optimisers_that_are_none(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.RMSprop, "expected torch.optim.SGD, Adam or AdamW, got RMSprop"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "has amsgrad=True"),
        (lambda p: torch.optim.SGD(p[1:], 0.1), r"lacks parameters .* \['0.weight'\]"),
        (lambda p: torch.optim.SGD([*p, torch.zeros(3)], 0.1), r"shape \(3,\) that is not the model's"),
        (lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.2}], 0.1), "differ in lr: 0.1, 0.2"),
        (
            lambda p: torch.optim.SGD(
                [{"params": p[:2], "weight_decay": 1}, {"params": p[2:], "weight_decay": 2}], 0.1
            ),
            "groups of one weight decay",
        ),
    ],
)
def test_torchs_optimisers_that_cannot_be_replayed(make: Any, words: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=words):
        optimizer_of(make(list(model.parameters())), model)


def test_frozen_parameters_in_an_optimisers_groups() -> None:
    model = network()
    frozen = model[0].bias.requires_grad_(False)
    groups = [{"params": [model[0].weight]}, {"params": [model[2].weight, model[2].bias], "weight_decay": 0.0}]
    for decay in (0.0, 0.3):
        made = torch.optim.AdamW([*groups, {"params": [frozen], "weight_decay": decay}], weight_decay=0.1)
        found = optimizer_of(made, model)
        assert (found.weight_decay, list(found.undecayed)) == (0.1, ["2.weight", "2.bias"])
    with pytest.raises(ValueError, match="none of its parameters requires a gradient"):
        optimizer_of(torch.optim.SGD([frozen]), model.requires_grad_(False))


def test_torchs_optimisers_and_models_that_are_none() -> None:
    training, _, _ = world(SGD(0.1))
    with pytest.raises(TypeError, match=r"expected assay\.retrain\.SGD or Adam, got int"):
        replace(training, optimizer=3)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        replace(training, model=3)
    with pytest.raises(TypeError, match="losses: expected a task or a function"):
        replace(training, losses=3)


def test_arguments() -> None:
    training, targets, _ = world(SGD(0.1))
    for words, given in (
        ("targets: expected one at least", {"targets": {}}),
        (r"targets: .* of different names, got \[1, '1'\]", {"targets": {1: targets["a"], "1": targets["b"]}}),
        ("target 'none': expected samples", {"targets": {"none": []}}),
        ("weights: expected finite numbers of shape", {"weights": [1.0]}),
        ("weights: expected finite numbers", {"weights": [float("nan")] * N}),
        ("checkpoints: expected an integer of at least 1", {"checkpoints": 0}),
        ("directions: expected an integer", {"directions": -1}),
        ("save_every: expected an integer", {"save_every": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            magic(training, **({"targets": targets, "directions": 0} | given))
    with pytest.raises(TypeError, match="targets: expected batches by name, got list"):
        magic(training, [targets["a"]])
    with pytest.raises(ValueError, match="width: expected"):
        metasmoothness(training, width=0)


def test_the_smallest_run() -> None:
    x, y = torch.ones(1, 3), torch.zeros(1, dtype=torch.int64)
    run = Training(nn.Linear(3, 2), losses, (x, y), torch.zeros(1, 1, dtype=torch.int64), SGD(np.array([0.1])))
    found = magic(run, {"t": [(x, y)]})
    assert found.scores.shape == (1, 1)
    assert float(found.scores) > 0


def test_a_perturbed_run_that_diverges_is_not_smooth() -> None:
    training, _, _ = world(SGD(0.1))
    steep = replace(training, losses=lambda model, batch: model[0](batch[0]).square().sum(1))
    assert metasmoothness(steep, directions=2, width=1e60).isnan().all()


def test_a_loss_that_is_not_finite_is_named() -> None:
    training, targets, _ = world(SGD(0.1))
    x, y = training.data
    x = x.clone()
    sample = int(training.rows[3][0])
    x[sample] = float("nan")
    first = next(t for t, rows in enumerate(training.rows) if sample in rows)
    with pytest.raises(Diverged, match=f"step {first}: the loss of sample {sample} is nan"):
        magic(replace(training, data=(x, y)), targets)
    with pytest.raises(ValueError, match="target 'a': the trained model's loss or its gradient is not finite: nan"):
        magic(training, {"a": [(x[sample : sample + 1], y[:1])]}, directions=0)


def test_a_task_gives_what_its_losses_give() -> None:
    """Its own cross entropy has a gradient by hand, which must have one in turn."""
    training, targets, weights = world(SGD(0.2, momentum=0.9))
    by_task = magic(replace(training, losses=Classification()), targets, weights=weights, directions=0)
    by_hand = magic(training, targets, weights=weights, directions=0)
    np.testing.assert_allclose(by_task.scores, by_hand.scores, rtol=1e-5, atol=1e-7)  # a task's losses are float32


def test_a_language_model_with_attention() -> None:
    """Fused attention has no second derivative: its formula runs in its place. Rows come by a function."""

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, input_ids: Tensor) -> Tensor:
            h = self.embedding(input_ids)[:, None]
            h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)[:, 0]
            return self.head(h)

    torch.manual_seed(0)
    tokens = torch.randint(11, (6, 5))
    training = Training(
        Tiny(),
        CausalLM(),
        lambda rows: {"input_ids": tokens[torch.from_numpy(rows)]},
        [[0, 1], [2, 3]],
        SGD(0.5),
        samples=6,
    )
    targets = {"t": [{"input_ids": tokens[4:]}]}
    found = magic(training, targets, directions=0)
    assert found.scores.isnan()[:, 0].tolist() == [False] * 4 + [True] * 2
    double = replace(training, model=training.model.double())
    for i in (0, 3):
        ends = []
        for h in (1e-3, -1e-3):
            weights = torch.ones(6) + h * torch.eye(6)[i]
            theta = torch.cat([p.flatten() for p in double.train(weights).values()])
            ends.append(double.target_gradient(theta, CausalLM(), targets["t"])[0])
        assert float(found.scores[i, 0]) == pytest.approx(-(ends[0] - ends[1]) / 2e-3, rel=2e-2, abs=1e-5)
