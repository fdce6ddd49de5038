"""What reweighting adds to a GPT-2-shaped model's training step: ``python -m benchmarks.online [--contract | --gpt2]``.

Every variant trains a copy of its own with AdamW on the same batch, in turn, and is compared with the plain step of the
same round. Contract (DESIGN): one layer at most 3 % beside the plain step, all layers at most 35 %. Where dattri-llm is
installed its ``DataSelectionCallback`` runs in turn with the others: it takes a sample's gradient out of `.grad` again,
and leaves out the output layer that is tied to the embedding. ``--contract`` times the contract's rows alone, in half a
batch: fewer copies, less noise, and over in a minute and a half. ``--gpt2`` times those of the head and of all layers
on GPT-2 itself (12 layers of 768, 2 × 1024 tokens): 16 GB.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from assay.methods import GradMimic, GraNd, InRunInfluence
from assay.tasks import CausalLM
from assay.train import Reweighter
from benchmarks import options, timing
from benchmarks.mimic import model_and_reference

HEAD = "mimic, head"
CONTRACT = (
    "plain step",
    "plain step, again",
    HEAD,
    f"{HEAD}, observed",
    f"{HEAD}, observed, its gradient summed",
    "mimic, last block",
    "mimic, last block, observed",
    "mimic, all layers",
)


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch. The output layer is tied to the embedding."""

    layers: int
    width: int
    samples: int
    tokens: int


ON_GPT2 = ("plain step", "plain step, again", HEAD, f"{HEAD}, observed, its gradient summed", "mimic, all layers")
SMALL = Shape(6, 384, 8, 256)
GPT2 = Shape(12, 768, 2, 1024)


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def step_of(model: nn.Module, ids: Tensor, backward: Callable[[Tensor], None]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(losses_of(model, ids))
        optimizer.step()

    return step


def dattri_llm(start: nn.Module, ids: Tensor, held_out: Tensor) -> dict[str, Callable[[], None]]:
    """Its ways to drop half of a batch: towards the batch itself, and towards held-out data."""
    from dattri_llm.gradient.callbacks import DataSelectionCallback
    from dattri_llm.gradient.hooks import HookManager

    def selecting(**target: Any) -> Callable[[], None]:
        model = copy.deepcopy(start).train()
        half = {"threshold": 0.5, "threshold_mode": "bottom_fraction"}
        callback = DataSelectionCallback(model, renormalize=True, selection_kwargs=half, **target)
        manager = HookManager(model, callbacks=[callback])
        plain = step_of(model, ids, lambda losses: losses.mean().backward())

        def step() -> None:
            with manager.collect():
                plain()

        return step

    towards = {"val_loader": [held_out], "val_loss_fn": lambda model, batch: losses_of(model, batch).mean()}
    return {
        "dattri-llm, best half, towards the batch": selecting(target="batch"),
        "dattri-llm, best half, towards held-out data": selecting(target="val_loader", **towards),
    }


def variants(shape: Shape, names: Collection[str] | None = None) -> dict[str, Callable[[], None]]:
    """By name, a step of each; None: of all, and of the peers."""
    start, reference = model_and_reference(shape.layers, shape.width, shape.tokens)
    ids, held_out = torch.randint(50257, (2, shape.samples, shape.tokens))
    task, last = CausalLM(), f"transformer.h.{shape.layers - 1}.*"

    def reweighted(layers: str | None, method: str = "mimic", **settings: Any) -> Callable[[], None]:
        model = copy.deepcopy(start).train()
        scored: Any = {
            "mimic": lambda: GradMimic(model, reference, task, layers),
            "grand": lambda: GraNd(model, task, layers),
            "in_run": lambda: InRunInfluence(model, task, {"held-out": [{"input_ids": held_out}]}, layers=layers),
        }[method]()
        return step_of(model, ids, Reweighter(model, scored, layers=layers, **settings).backward)

    def plain() -> Callable[[], None]:
        return step_of(copy.deepcopy(start).train(), ids, lambda losses: losses.mean().backward())

    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "plain step": plain,
        "plain step, again": plain,
        "mimic, last norm": lambda: reweighted("transformer.ln_f"),
        "mimic, last block": lambda: reweighted(last),
        HEAD: lambda: reweighted("lm_head"),
        f"{HEAD}, observed": lambda: reweighted("lm_head", mode="observe"),
        f"{HEAD}, observed, its gradient summed": lambda: reweighted("lm_head", mode="observe", exact=False),
        "mimic, all layers": lambda: reweighted(None),
        "mimic, all layers, recomputed": lambda: reweighted(None, recompute=True),
        "mimic, last block, observed": lambda: reweighted(last, mode="observe"),
        "GraNd, all layers": lambda: reweighted(None, "grand"),
        "mimic, best half, all layers": lambda: reweighted(None, mode="filter", keep=0.5),
        "in-run, best half, all layers": lambda: reweighted(None, "in_run", mode="filter", keep=0.5),
    }
    rivals = {}
    if names is None:
        with contextlib.suppress(ImportError):
            rivals = dattri_llm(start, ids, held_out)
    return {name: make() for name, make in makers.items() if names is None or name in names} | rivals


def shown(title: str, timings: dict[str, timing.Timing], ratios: dict[str, timing.Ratio]) -> Table:
    table = Table("training step", "median ms", "÷ plain step", "of single rounds", title=title)
    for name, own in ratios.items():
        table.add_row(name, f"{timings[name].median:.0f}", f"{own.median:.3f}", f"{own.least:.2f}–{own.most:.2f}")
    return table


def main() -> None:
    parser = options.parser(__doc__)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--contract", action="store_true", help="the contract's rows alone, in half a batch")
    only.add_argument("--gpt2", action="store_true", help="its rows of the head and of all layers on GPT-2 itself")
    asked = parser.parse_args()
    names = CONTRACT if asked.contract else ON_GPT2 if asked.gpt2 else None
    shape = GPT2 if asked.gpt2 else replace(SMALL, samples=4) if asked.contract else SMALL
    samples = timing.in_turn(variants(shape, names), rounds=3 if names else 5, warmup=1)
    timings = {name: timing.summary(values) for name, values in samples.items()}
    ratios = {name: timing.ratio(values, samples["plain step"]) for name, values in samples.items()}
    model = f"GPT-2 {shape.layers}×{shape.width}, vocabulary 50257"
    Console().print(shown(f"{model}, batch {shape.samples} × {shape.tokens}, float32", timings, ratios))
    case = {"model": model, "batch": [shape.samples, shape.tokens], "timings": timings, "ratios": ratios}
    path = timing.write("online" + "-contract" * asked.contract + "-gpt2" * asked.gpt2, [case])
    print("written to", path.relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
