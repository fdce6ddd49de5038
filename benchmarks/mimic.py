"""Mimic scores and sketches of a whole GPT-2-shaped model against a training step: ``python -m benchmarks.mimic``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assay import Kronecker
from assay.methods import GradMimic, Scorer
from assay.probe import Dot, Probe, Sketched, tapped_parameters
from assay.tasks import CausalLM
from benchmarks import options, timing


def model_and_reference(
    layers: int = 6, width: int = 384, tokens: int = 256
) -> tuple[torch.nn.Module, torch.nn.Module]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 64, n_positions=tokens, use_cache=False)
    model = GPT2LMHeadModel(config)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    return model, reference


def main() -> None:
    options.parser(__doc__).parse_args()
    model, reference = model_and_reference()
    batch = {"input_ids": torch.randint(50257, (8, 256))}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    task = CausalLM()
    trained = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        trained(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()

    def forward_backward() -> None:
        """What any gradient score has to pay: no weight gradients."""
        for p in trained.parameters():
            p.requires_grad_(False)
        try:
            embeds = trained.transformer.wte(batch["input_ids"]).requires_grad_()
            trained(
                inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["input_ids"]
            ).loss.backward()
        finally:
            for p in trained.parameters():
                p.requires_grad_(True)

    method = GradMimic(model, reference, task)
    direction = {name: method.direction[name] for name in tapped_parameters(model)}
    probe, scorer = Probe(model, task, reductions={"mimic": Dot(direction)}, logits=False), Scorer([method])
    shapes = {name: tuple(d.shape) for name, d in direction.items()}
    sketcher = Probe(model, task, reductions={"sketch": Sketched(shapes, Kronecker(16, 16))}, logits=False)
    timings = timing.interleave(
        {
            "training step": train,
            "forward + backward, no weight gradients": forward_backward,
            "mimic of all layers": lambda: probe(batch),
            "Kronecker 16 × 16 sketch of all layers": lambda: sketcher(batch),
            "GradMimic (with the reference's forward)": lambda: scorer(batch),
        },
        rounds=9,
    )
    coverage = probe.coverage
    step, bare = (timings[n].median for n in ("training step", "forward + backward, no weight gradients"))
    table = Table(title=f"GPT-2 shape, 6 layers × 384, batch 8 × 256, float32; {coverage:.1%} of the parameters tapped")
    for heading in ("", "median ms", "÷ training step", "÷ forward + backward"):
        table.add_column(heading)
    for name, t in timings.items():
        table.add_row(name, f"{t.median:.0f}", f"{t.median / step:.2f}", f"{t.median / bare:.2f}")
    Console().print(table)
    case: dict[str, Any] = {
        "model": "GPT-2 6×384, vocabulary 50257",
        "batch": [8, 256],
        "coverage": coverage,
        "timings": timings,
    }
    print("written to", timing.write("mimic", [case]).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
