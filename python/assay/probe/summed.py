"""The sum of a batch's gradients: a plain backward pass, with nothing kept by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assay.probe.quiet import undisturbed
from assay.probe.verify import without_graph
from assay.tasks import Task
from assay.tasks.base import base_task, read


def summed_gradient(
    model: nn.Module, task: Task, batch: Any, parameters: Sequence[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Σ_i ∇ℓ_i over the samples with a loss, in eval mode, at the weights as they are; no ``.grad`` is touched.

    Args:
        batch: what the task takes, on any device.
        parameters: names of trainable parameters.

    Returns:
        By parameter, of its shape and dtype, 0 where the losses do not reach it; and how many samples have a loss, ().
    """
    run = base_task(task)
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad():
        chosen = {name: model.get_parameter(name) for name in parameters}
        for parameter in chosen.values():
            parameter.requires_grad_(True)  # as it was, and will be
        first = next(iter(chosen.values()))
        outputs = read(task, run.forward(model, run.to(batch, first.device)))
        with_loss = ~outputs.losses.detach().isnan()
        if not outputs.losses.requires_grad:
            raise RuntimeError(without_graph(task))
        total = outputs.losses[with_loss].sum()
        found = torch.autograd.grad(total, list(chosen.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(chosen, found, strict=True)), with_loss.sum()
