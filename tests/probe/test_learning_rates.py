"""Rates are what an optimiser multiplies gradients with: those of the step that it has just made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from assay.probe.learning_rates import LearningRates

NAMES = ["weight", "bias"]
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.3),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.0, 0.95)),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, betas=(0.0, 0.99), weight_decay=0),
    "amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, betas=(0.0, 0.5), amsgrad=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01),
    "centered": lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.01, lr_decay=0.1),
}


def trained(make, steps: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """With two learning rates -> also how far the last step has gone."""
    layer = nn.Linear(4, 3)
    optimizer = make([{"params": [layer.weight]}, {"params": [layer.bias], "lr": 0.002}])
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(6, 4)).square().mean().backward()
        before = {name: p.detach().clone() for name, p in layer.named_parameters()}
        optimizer.step()
    return layer, optimizer, {name: before[name] - p.detach() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_gradient_times_its_rates_is_the_step(kind) -> None:
    layer, optimizer, steps = trained(OPTIMIZERS[kind])
    rates = LearningRates(optimizer, layer, NAMES)
    assert rates.are_known
    for name, rate in rates.by_parameter().items():
        torch.testing.assert_close(rate * layer.get_parameter(name).grad, steps[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_before_the_first_step_only_a_plain_one_is_known(kind) -> None:
    layer, optimizer, _ = trained(OPTIMIZERS[kind], steps=0)
    rates = LearningRates(optimizer, layer, NAMES)
    assert rates.are_known == (kind == "sgd")
    if kind != "sgd":
        with pytest.raises(ValueError, match=r"has made no step with 'weight' yet.*warmup_steps=1"):
            rates.by_parameter()


def test_what_is_not_taken() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="does not train 'bias'"):
        LearningRates(torch.optim.SGD([layer.weight]), layer, NAMES)
    with pytest.raises(ValueError, match="maximize=True"):
        LearningRates(torch.optim.SGD(layer.parameters(), maximize=True), layer, NAMES)
    with pytest.raises(ValueError, match="LBFGS scales gradients in a way"):
        LearningRates(torch.optim.LBFGS(layer.parameters()), layer, NAMES)
    for setting in ("trust_coeff", "trust_coefficient", "wd_ratio"):  # LARS, of several libraries, and SGDP
        scaled = torch.optim.SGD(layer.parameters(), lr=0.1)
        scaled.param_groups[0][setting] = 1e-3
        with pytest.raises(ValueError, match="SGD scales gradients in a way"):
            LearningRates(scaled, layer, NAMES)
    layer, optimizer, _ = trained(torch.optim.Adamax)
    with pytest.raises(ValueError, match="Adamax keeps no exp_avg_sq of 'weight' in shape"):
        LearningRates(optimizer, layer, NAMES).by_parameter()
