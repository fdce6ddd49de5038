"""Mixtures of experts against autograd, one sample at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from assay import ops
from assay.probe import Dense, Dot, Probe, Sketched, SqNorm, tapped_parameters
from assay.tasks import CausalLM
from tests.probe.probe_oracle import Collect, close, random_direction
from tests.probe.test_models import randomise, text_batch

transformers = pytest.importorskip("transformers")

OPTIONS: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "head_dim": 4,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
MODELS: dict[str, Any] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 6},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 6, "shared_expert_intermediate_size": 10},
    "GptOss": {"num_local_experts": 3},  # transposed weights, biases, gates between the others' columns
    "Olmoe": {"num_experts": 3},
    "GraniteMoe": {"num_local_experts": 3},
    "DeepseekV3": {
        **{"num_key_value_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4, "v_head_dim": 4, "first_k_dense_replace": 0},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1},
        "moe_intermediate_size": 6,
    },
    "NemotronH": {  # no gate
        **{"hybrid_override_pattern": "E", "n_routed_experts": 3, "n_group": 1, "topk_group": 1},
        **{"moe_intermediate_size": 6, "moe_shared_expert_intermediate_size": 6, "mamba_num_heads": 2},
    },
    "Llama4": {"num_local_experts": 3, "intermediate_size_mlp": 12, "pad_token_id": 0, "num_experts_per_tok": 1},
}


def mixture(kind: str) -> nn.Module:
    family = "Llama4Text" if kind == "Llama4" else kind
    config = getattr(transformers, f"{family}Config")(**{**OPTIONS, **MODELS[kind]})
    return randomise(getattr(transformers, f"{kind}ForCausalLM")(config))


@pytest.mark.parametrize("lengths", [(7, 3, 5), (6,)])
@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_of_a_mixture(kind: str, lengths: tuple[int, ...]) -> None:
    model, texts = mixture(kind).eval(), text_batch(*lengths)
    names = tapped_parameters(model)
    assert set(names) == {name for name, _ in model.named_parameters()}
    direction, collect = random_direction(model, names), Collect(names)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    sketches = {"kronecker": ops.Kronecker(2, 3), "sparse": ops.Sparse(16)}
    reductions: dict[str, Any] = {
        "collect": collect,
        **{f"dot {n}": Dot({n: direction[n]}) for n in names},
        **{f"norm {n}": SqNorm([n]) for n in names},
        **{f"{key} {n}": Sketched({n: shapes[n]}, s, True) for key, s in sketches.items() for n in names},
    }
    probe = Probe(model, CausalLM(), reductions=reductions)
    found = probe(texts).reduced
    assert probe.coverage == 1
    parameters = dict(model.named_parameters())
    for b in range(len(lengths)):
        loss = CausalLM(fused=False).forward(model, {k: v[b : b + 1] for k, v in texts.items()}).losses.sum()
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True)
        for name, g in zip(names, gradients, strict=True):
            exact = torch.zeros_like(parameters[name]) if g is None else g
            mine = collect.dense[name][b] if name in collect.dense else torch.zeros_like(exact)
            close(mine, exact, 2e-5, name)  # norms and the router compute in float32
            close(found[f"dot {name}"][b], (exact * direction[name]).sum(), 2e-4, name)
            close(found[f"norm {name}"][b], exact.square().sum(), 1e-4, name)
            for key, sketch in sketches.items():
                expected = Dense(exact[None]).sketch(sketch.named(name), shapes[name])[0]
                close(found[f"{key} {name}"][b], expected, 1e-3, name)


def test_experts_have_no_factors() -> None:
    model = mixture("Mixtral")
    with pytest.raises(ValueError, match=r"mlp\.experts' \(MixtralExperts\) cannot be tapped exactly: .* no factors"):
        Probe(model, CausalLM(), factors="*.experts")
    assert Probe(model, CausalLM(), factors="*", skip_unsupported=True).coverage < 1
