"""What reweighting adds to a GPT-2-shaped model's training step: ``python -m benchmarks.online [--contract | …]``.

Every variant trains a copy of its own with AdamW on the same batch, in turn, and is compared with the plain step of the
same round. Contract (DESIGN): one layer at most 3 % beside the plain step, all layers at most 35 %.

- ``--contract``: the contract's rows alone, in half a batch: fewer copies, less noise, and over in a minute and a half.
- ``--gpt2``: those of the head and of all layers on GPT-2 itself (12 layers of 768, 2 × 1024 tokens): 16 GB.
- ``--peers``: peers that are installed, and what is nearest to them. dattri-llm's ``DataSelectionCallback`` takes a
  sample's gradient out of `.grad` again; bergson's ``GradientCollectorCallback`` changes nothing, and stores a 16 × 16
  sketch of each layer's gradient by sample. Both leave out the output layer that is tied to the embedding.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

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


BESIDE_PEERS = (
    "plain step",
    "plain step, again",
    "mimic, all layers",
    "mimic, best half, all layers",
    "in-run, best half, all layers",
)
ON_GPT2 = ("plain step", "plain step, again", HEAD, f"{HEAD}, observed, its gradient summed", "mimic, all layers")
SMALL = Shape(6, 384, 8, 256)
GPT2 = Shape(12, 768, 2, 1024)


def losses_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
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


def bergson(start: nn.Module, ids: Tensor) -> dict[str, Callable[[], None]]:
    """Its callback of transformers' trainer, called as the trainer calls it, in a run of one batch."""
    from bergson.huggingface import GradientCollectorCallback

    model, rows = copy.deepcopy(start).train(), torch.arange(len(ids))
    callback = GradientCollectorCallback(Path(tempfile.mkdtemp()), projection_dim=16)
    args, state = SimpleNamespace(), SimpleNamespace(epoch=0, global_step=1)
    args.__gradient_collection_enabled__ = True
    callback.on_train_begin(args, state, None, model=model)
    callback.on_epoch_begin(args, state, None, train_dataloader=DataLoader(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        losses_of(partial(model, _idx=rows), ids).mean().backward()
        optimizer.step()
        callback.on_step_end(args, state, None, model=model, optimizer=optimizer)

    return {"bergson, sketches of 16 × 16 stored": step}


def installed_peers(start: nn.Module, ids: Tensor, held_out: Tensor) -> dict[str, Callable[[], None]]:
    found = {}
    for peer in (partial(dattri_llm, start, ids, held_out), partial(bergson, start, ids)):
        with contextlib.suppress(ImportError):
            found.update(peer())
    return found


def variants(
    shape: Shape, names: Collection[str] | None = None, with_peers: bool = False
) -> dict[str, Callable[[], None]]:
    """By name, a step of each; None: of all."""
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
    own = {name: make() for name, make in makers.items() if names is None or name in names}
    return own | (installed_peers(start, ids, held_out) if with_peers else {})


def shown(title: str, timings: dict[str, timing.Timing], ratios: dict[str, timing.Ratio]) -> Table:
    table = Table("training step", "median ms", "÷ plain step", "of single rounds", title=title)
    for step, own in ratios.items():
        table.add_row(step, f"{timings[step].median:.0f}", f"{own.median:.3f}", f"{own.least:.2f}–{own.most:.2f}")
    return table


def main() -> None:
    parser = options.parser(__doc__)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--contract", action="store_true", help="the contract's rows alone, in half a batch")
    only.add_argument("--gpt2", action="store_true", help="its rows of the head and of all layers on GPT-2 itself")
    only.add_argument("--peers", action="store_true", help="peers that are installed, and what is nearest to them")
    asked = parser.parse_args()
    name, shape, names = "online", SMALL, None
    if asked.contract:
        name, shape, names = "online-contract", replace(SMALL, samples=4), CONTRACT
    elif asked.gpt2:
        name, shape, names = "online-gpt2", GPT2, ON_GPT2
    elif asked.peers:
        name, names = "online-peers", BESIDE_PEERS
    steps = variants(shape, names, with_peers=names in (None, BESIDE_PEERS))
    samples = timing.in_turn(steps, rounds=3 if names else 5, warmup=1)
    timings = {name: timing.summary(values) for name, values in samples.items()}
    ratios = {name: timing.ratio(values, samples["plain step"]) for name, values in samples.items()}
    model = f"GPT-2 {shape.layers}×{shape.width}, vocabulary 50257"
    Console().print(shown(f"{model}, batch {shape.samples} × {shape.tokens}, float32", timings, ratios))
    case = {"model": model, "batch": [shape.samples, shape.tokens], "timings": timings, "ratios": ratios}
    path = timing.write(name, [case])
    print("written to", path.relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
