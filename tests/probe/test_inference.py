"""Inference mode where no gradient is wanted: the same bits, and gradients elsewhere as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from assay.methods import Ensemble, GradMimic, Scorer
from assay.probe import Probe, SqNorm
from assay.tasks import CausalLM, Classification
from tests.probe.test_head import CHANGES, batch, changed, llama


class Told(nn.Module):
    """Says whether it ran in inference mode, and with gradients."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> Any:
        self.modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return self.inner(x)


@pytest.mark.parametrize(
    "name", ["float", "scale of one", "scale in place", "mask in no_grad", "cut", "clamp", "numpy"]
)
def test_language_models_have_the_same_bits(name: str) -> None:
    inputs = batch(7, 5, 1)
    for ids in inputs["input_ids"]:
        ids.clamp_(max=249)
    results = [Probe(changed(CHANGES[name]), CausalLM(), factors=(), inference=mode)(inputs) for mode in (False, True)]
    for one, two in zip(*([s.losses, s.logits, s.row_losses] for s in results), strict=True):
        assert torch.equal(one.nan_to_num(-1), two.nan_to_num(-1))


def test_hidden_states_that_change_after_the_head_do_not_change_its_logits() -> None:
    """Nothing counts a tensor's changes in inference mode."""
    model, inputs = llama(False), batch(7, 5)
    expected = Probe(model, CausalLM(), factors=())(inputs)

    class Spoils(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def get_output_embeddings(self) -> Any:
            return self.inner.lm_head

        def forward(self, **kwargs: Any) -> Any:
            kept: list[torch.Tensor] = []
            hook = self.inner.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
            try:
                output = self.inner(**kwargs)
            finally:
                hook.remove()
            kept[0].mul_(3)
            return output

    for mode in (False, True):
        found = Probe(Spoils(), CausalLM(), factors=(), inference=mode)(inputs)
        assert torch.equal(found.losses, expected.losses)
        assert torch.equal(found.logits, expected.logits)


def test_only_models_without_gradients_run_in_inference_mode() -> None:
    models = [Told(nn.Linear(4, 3)) for _ in range(3)]
    task, inputs = Classification(), (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    methods = [GradMimic(models[0], models[1], task), Ensemble([models[0], models[2]], task)]
    plain, fast = Scorer(methods)(inputs), Scorer(methods, inference=True)(inputs)
    assert plain.keys() == fast.keys()
    assert all(torch.equal(plain[name], fast[name]) for name in plain)
    before, after = [[mode for mode, _ in m.modes[:1]] for m in models], [m.modes[-1] for m in models]
    assert before == [[False]] * 3
    assert after == [(False, True), (True, False), (True, False)]


def test_a_probe_that_takes_gradients_takes_them() -> None:
    model = Told(nn.Linear(4, 3))
    inputs = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    reductions = {"sqnorm": SqNorm(("inner.weight",))}
    found = Probe(model, Classification(), reductions=reductions, inference=True)(inputs)
    assert (found.reduced["sqnorm"] > 0).all()
    assert not any(mode for mode, _ in model.modes)
