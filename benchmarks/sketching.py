"""A 16 × 16 sketch of every layer's per-sample gradient, beside bergson and dattri: ``python -m benchmarks.sketching``.

The same GPT-2-shaped model and batch for everybody. Its Conv1D layers are made Linear, which is all that dattri takes;
the peers sketch the Linear layers, output layer included, assay the embeddings, norms and biases as well. Every
parameter is frozen and only the embedding's output asks for a gradient: nobody pays for weight gradients that are not
used. Peers that are not installed are named.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from assay import Kronecker
from assay.probe import Probe, Sketched, tapped_parameters
from assay.tasks import CausalLM
from benchmarks import options, timing

SIDE, BATCH, LENGTH = 16, 8, 256
Run = Callable[[], Any]


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6, n_positions=LENGTH, use_cache=False)).eval()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv1D):
                linear = nn.Linear(*layer.weight.shape)
                linear.weight, linear.bias = nn.Parameter(layer.weight.detach().T.contiguous()), layer.bias
                setattr(parent, name, linear)
    return model


def frozen(model: nn.Module) -> nn.Module:
    """A copy whose backward pass makes no weight gradient."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda layer, args, out: out.requires_grad_())
    return model


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """(B,): sums over tokens."""
    logits = model(input_ids=ids).logits[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).sum(1)


def forward_backward(model: nn.Module, ids: Tensor) -> Run:
    model = frozen(model)
    return lambda: losses(model, ids).sum().backward()


def assay_sketch(model: nn.Module, ids: Tensor, only: set[str] | None = None) -> Run:
    sizes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = {n: sizes[n] for n in tapped_parameters(model) if only is None or n in only}
    sketched = Sketched(shapes, Kronecker(SIDE, SIDE))
    probe = Probe(model, CausalLM(), reductions={"sketch": sketched}, logits=False)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: probe(batch).reduced["sketch"]


def bergson_sketch(model: nn.Module, ids: Tensor) -> Run:
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    model = frozen(model)
    model.transformer.ln_f.bias.requires_grad_()  # it takes its dtype from the parameters that are trained
    collector = GradientCollector(
        model=model,
        data=Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)}),
        cfg=IndexConfig(run_path="unused"),
        processor=GradientProcessor(projection_dim=SIDE, projection_type="rademacher"),
        skip_index=True,
    )

    def run() -> dict[str, Tensor]:
        with collector:
            losses(model, ids).sum().backward()
        return collector.mod_grads

    return run


def dattri_sketch(model: nn.Module, ids: Tensor) -> Run:
    """LoGra's collection, as ``BlockProjectedIFAttributor.cache`` runs it for each batch."""
    from dattri.algorithm.block_projected_if.core.compressor import setup_model_compressors
    from dattri.algorithm.block_projected_if.core.hook import HookManager

    logging.getLogger("dattri").setLevel(logging.ERROR)
    model = frozen(model)
    names = linear_layers(model)
    common = {"device": "cpu", "proj_max_batch_size": 64}
    compressors = setup_model_compressors(
        model,
        names,
        sparsifier_kwargs={**common, "proj_dim": SIDE, "proj_type": "normal"},
        projector_kwargs={**common, "proj_dim": -1, "proj_type": "identity"},
        sample_inputs={"input_ids": ids},
        device="cpu",
    )
    manager = HookManager(model, names)
    manager.set_compressors(compressors)

    def run() -> list[Tensor]:
        losses(model, ids).sum().backward()
        return manager.get_compressed_grads()

    return run


PEERS = {"bergson": bergson_sketch, "dattri": dattri_sketch}


def _if_present(make: Callable[[nn.Module, Tensor], Run], model: nn.Module, ids: Tensor) -> Run | str:
    try:
        return make(model, ids)
    except ImportError as error:
        return f"absent: {error}"


def main() -> None:
    options.parser(__doc__).parse_args()
    model, ids = language_model(), torch.randint(50257, (BATCH, LENGTH))
    linear = {f"{name}.weight" for name in linear_layers(model)}
    # A weight with two names has one place in the sketch, under its first.
    tied = {name for name, p in model.named_parameters() if p is model.lm_head.weight}
    same = (linear | tied) & set(tapped_parameters(model))
    variants: dict[str, Run] = {
        "forward + backward, no weight gradients": forward_backward(model, ids),
        "assay, all parameters": assay_sketch(model, ids),
        "assay, the Linear layers": assay_sketch(model, ids, same),
    }
    made = {name: _if_present(make, model, ids) for name, make in PEERS.items()}
    variants |= {name: run for name, run in made.items() if not isinstance(run, str)}
    absent = {name: reason for name, reason in made.items() if isinstance(reason, str)}
    timings = timing.interleave(variants, rounds=9)
    bare = next(iter(timings.values())).median
    table = Table(title=f"{SIDE} × {SIDE} per layer; GPT-2 shape, 6 layers × 384, batch {BATCH} × {LENGTH}, float32")
    for heading in ("", "median ms", "÷ forward + backward"):
        table.add_column(heading)
    for name, t in timings.items():
        table.add_row(name, f"{t.median:.0f}", f"{t.median / bare:.2f}")
    Console().print(table)
    for name, reason in absent.items():
        print(f"{name}: {reason}")
    case = {"model": "GPT-2 6×384, vocabulary 50257", "batch": [BATCH, LENGTH], "timings": timings, "absent": absent}
    print("written to", timing.write("sketching", [case]).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
