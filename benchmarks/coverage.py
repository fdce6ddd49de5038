"""How much of common architectures the probe taps exactly: tiny random models of transformers, one line each.

    python -m benchmarks.coverage [NAME ...]

Every model runs one batch of three samples. ``tapped`` is the share of the parameters' elements whose gradients the
probe has; ``error`` the largest difference of a parameter's squared norm from autograd's, one sample at a time, against
the largest of the parameter (a thousandth of the model's at least). What is left out is listed by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from assay.probe import Probe, SqNorm
from assay.probe.selection import select
from assay.tasks import CausalLM, Classification, Task
from assay.tasks.base import unfused
from benchmarks import options

SAMPLES, LENGTH, VOCABULARY, CLASSES = 3, 6, 40, 2
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 4}
IMAGES = {**SMALL, "image_size": 8, "patch_size": 4, "num_channels": 3}
MIXTURE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 6, "experts_implementation": "eager"}
DEEPSEEK = {
    **{key: value for key, value in MIXTURE.items() if key not in ("head_dim", "num_key_value_heads")},
    "num_key_value_heads": 2,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
GEMMA_3N = {
    **GROUPED,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
    "laurel_rank": 2,
    "activation_sparsity_pattern": None,
}
LINEAR_ATTENTION = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}
SWITCH = {
    **TEXT,
    "d_model": 8,
    "d_ff": 12,
    "num_layers": 2,
    "num_heads": 2,
    "d_kv": 4,
    "num_experts": 3,
    "num_sparse_encoder_layers": 1,
}
GPT_STYLE = {"vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
CLIP_TOWERS = {
    "text_config": {**TEXT, "max_position_embeddings": 16, "projection_dim": 6},
    "vision_config": {**IMAGES, "projection_dim": 6},
    "projection_dim": 6,
}
WHISPER = {
    "d_model": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 12,
    "num_mel_bins": 4,
    "max_source_positions": 6,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
}
SPEECH = {
    **SMALL,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


@dataclass(frozen=True)
class Case:
    """``head``: the model class's name behind the family's; ``batch``: text, causal, image, mel or wave;
    ``part``: of which the configuration is, behind the family's name.
    """

    family: str
    head: str
    batch: str
    options: dict[str, Any]
    part: str = ""

    def build(self) -> nn.Module:
        config = getattr(transformers, f"{self.family}{self.part}Config")(**self.options)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.family}{self.head}")(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.2)
        return model if self.head.startswith("For") or self.head == "LMHeadModel" else Pooled(model)

    def task(self) -> Task:
        return CausalLM() if self.batch == "causal" else Classification()

    def inputs(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
        mask = (torch.arange(LENGTH) < torch.tensor([LENGTH, 4, 5])[:, None]).long()
        text = {"input_ids": ids, "attention_mask": mask}
        if self.batch == "causal":
            return text
        side = int(self.options.get("image_size", 32))
        shapes = {"image": (SAMPLES, 3, side, side), "mel": (SAMPLES, 4, 12), "wave": (SAMPLES, 60)}
        batch = text if self.batch == "text" else torch.randn(shapes[self.batch], generator=generator)
        return batch, torch.tensor([0, 1, 1])


class Pooled(nn.Module):
    """An encoder with its mean hidden state as logits."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.encoder(*args, **kwargs)[0]
        return hidden.flatten(2).mean(1) if hidden.ndim == 3 else hidden.flatten(1)


def _text(family: str, **options: Any) -> Case:
    return Case(family, "ForSequenceClassification", "text", {**TEXT, "max_position_embeddings": 16, **options})


def _causal(family: str, head: str = "ForCausalLM", base: dict[str, Any] = GROUPED, **options: Any) -> Case:
    return Case(family, head, "causal", {**base, **options})


def _image(family: str, **options: Any) -> Case:
    return Case(family, "ForImageClassification", "image", {**IMAGES, **options})


DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
CASES: dict[str, Callable[[], Case]] = {
    "BERT": lambda: _text("Bert"),
    "RoBERTa": lambda: _text("Roberta"),
    "DistilBERT": lambda: _text("DistilBert", dim=8, n_layers=2, n_heads=2, hidden_dim=12),
    "ALBERT": lambda: _text("Albert", embedding_size=4),
    "ELECTRA": lambda: _text("Electra", embedding_size=4),
    "DeBERTa": lambda: _text("Deberta", **DEBERTA),
    "DeBERTa-v2": lambda: _text("DebertaV2", **DEBERTA, position_buckets=4, norm_rel_ebd="layer_norm"),
    "ModernBERT": lambda: _text("ModernBert"),
    "XLM-RoBERTa": lambda: _text("XLMRoberta"),
    "MPNet": lambda: _text("MPNet"),
    "Longformer": lambda: _text("Longformer", attention_window=4),
    "SqueezeBERT": lambda: _text(
        "SqueezeBert",
        embedding_size=8,
        **{f"{part}_groups": 2 for part in ("q", "k", "v", "intermediate", "output")},
    ),
    "T5 encoder": lambda: Case(
        "T5", "EncoderModel", "text", {**TEXT, "d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2, "d_kv": 4}
    ),
    "GPT-2": lambda: _causal("GPT2", "LMHeadModel", GPT_STYLE),
    "GPT-Neo": lambda: _causal(
        "GPTNeo", base=TEXT, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    ),
    "GPT-J": lambda: _causal("GPTJ", base=GPT_STYLE, rotary_dim=4),
    "GPT-NeoX": lambda: _causal("GPTNeoX", base=TEXT),
    "OPT": lambda: _causal("OPT", base=TEXT, ffn_dim=12, word_embed_proj_dim=8, max_position_embeddings=16),
    "BLOOM": lambda: _causal("Bloom", base={**TEXT, "n_layer": 2, "n_head": 2}),
    "Falcon": lambda: _causal("Falcon", base=TEXT),
    "MPT": lambda: _causal("Mpt", base={"d_model": 8, "n_heads": 2, "n_layers": 2, "vocab_size": VOCABULARY}),
    "Llama": lambda: _causal("Llama"),
    "Mistral": lambda: _causal("Mistral"),
    "Qwen2": lambda: _causal("Qwen2"),
    "Qwen3": lambda: _causal("Qwen3"),
    "Gemma": lambda: _causal("Gemma"),
    "Gemma 2": lambda: _causal("Gemma2"),
    "Gemma 3": lambda: Case("Gemma3", "ForCausalLM", "causal", GROUPED, "Text"),
    "Phi-3": lambda: _causal("Phi3"),
    "OLMo 2": lambda: _causal("Olmo2"),
    "StableLM": lambda: _causal("StableLm"),
    "SmolLM 3": lambda: _causal("SmolLM3"),
    "GLM 4": lambda: _causal("Glm4"),
    "Gemma 3n": lambda: Case("Gemma3n", "ForCausalLM", "causal", GEMMA_3N, "Text"),
    "Qwen3.5": lambda: Case("Qwen3_5", "ForCausalLM", "causal", {**GROUPED, **LINEAR_ATTENTION}, "Text"),
    "LFM 2": lambda: _causal("Lfm2", layer_types=["conv", "full_attention"], block_ff_dim=12),
    "RWKV": lambda: _causal("Rwkv", base=TEXT, attention_hidden_size=8),
    "Mamba": lambda: _causal("Mamba", base={**TEXT, "state_size": 4, "time_step_rank": 2}),
    "Mamba 2": lambda: _causal("Mamba2", base={**TEXT, "state_size": 4, "num_heads": 4, "head_dim": 4, "n_groups": 1}),
    "RecurrentGemma": lambda: _causal("RecurrentGemma", lru_width=8, num_hidden_layers=3),
    "Mixtral": lambda: _causal("Mixtral", base=MIXTURE, num_local_experts=3),
    "Qwen2-MoE": lambda: _causal("Qwen2Moe", base=MIXTURE, num_experts=3, shared_expert_intermediate_size=10),
    "Qwen3-MoE": lambda: _causal("Qwen3Moe", base=MIXTURE, num_experts=3),
    "OLMoE": lambda: _causal("Olmoe", base=MIXTURE, num_experts=3),
    "GPT-OSS": lambda: _causal("GptOss", base=MIXTURE, num_local_experts=3),
    "DeepSeek-V3": lambda: _causal("DeepseekV3", base=DEEPSEEK),
    "GraniteMoE": lambda: _causal("GraniteMoe", base=MIXTURE, num_local_experts=3),
    "PhiMoE": lambda: _causal("Phimoe", base=MIXTURE, num_local_experts=3),
    "Llama 4": lambda: Case(
        "Llama4", "ForCausalLM", "causal", {**MIXTURE, "num_local_experts": 3, "intermediate_size_mlp": 12}, "Text"
    ),
    "JetMoE": lambda: _causal(
        "JetMoe", base=TEXT, num_key_value_heads=2, kv_channels=4, num_local_experts=3, num_experts_per_tok=1
    ),
    "Jamba": lambda: _causal(
        "Jamba", base=MIXTURE, num_experts=2, attn_layer_offset=1, attn_layer_period=2, mamba_d_state=4, mamba_dt_rank=2
    ),
    "Switch encoder": lambda: Case("SwitchTransformers", "EncoderModel", "text", SWITCH),
    "ViT": lambda: _image("ViT"),
    "DeiT": lambda: _image("Deit" if hasattr(transformers, "DeitConfig") else "DeiT"),
    "BEiT": lambda: _image("Beit", use_relative_position_bias=True),
    "DINOv2": lambda: _image("Dinov2"),
    "Swin": lambda: Case(
        "Swin",
        "ForImageClassification",
        "image",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2},
    ),
    "SwinV2": lambda: Case(
        "Swinv2",
        "ForImageClassification",
        "image",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    ),
    "ConvNeXt": lambda: Case(
        "ConvNext", "ForImageClassification", "image", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
    ),
    "ConvNeXt-V2": lambda: Case(
        "ConvNextV2", "ForImageClassification", "image", {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
    ),
    "ResNet": lambda: Case(
        "ResNet",
        "ForImageClassification",
        "image",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "MobileViT": lambda: Case(
        "MobileViT",
        "ForImageClassification",
        "image",
        {"image_size": 32, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2},
    ),
    "SegFormer": lambda: Case(
        "Segformer",
        "ForImageClassification",
        "image",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [8, 8],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
        },
    ),
    "CLIP text": lambda: Case("CLIPText", "Model", "text", CLIP_TOWERS["text_config"]),  # type: ignore[arg-type]
    "CLIP vision": lambda: Case("CLIPVision", "Model", "image", CLIP_TOWERS["vision_config"]),  # type: ignore[arg-type]
    "SigLIP vision": lambda: Case("SiglipVision", "Model", "image", IMAGES),
    "Whisper encoder": lambda: Case("Whisper", "ForAudioClassification", "mel", WHISPER),
    "wav2vec 2.0": lambda: Case("Wav2Vec2", "ForSequenceClassification", "wave", SPEECH),
    "HuBERT": lambda: Case("Hubert", "ForSequenceClassification", "wave", SPEECH),
}


@dataclass(frozen=True)
class Coverage:
    """``left_out``: reasons by parameter."""

    share: float
    error: float
    left_out: dict[str, str]


def cover(case: Case) -> Coverage:
    """Run a case with everything that can be tapped.

    Raises:
        RuntimeError: the probe's check failed.
    """
    model, batch = case.build(), case.inputs()
    selection = select(model, None, skip_unsupported=True)
    reductions = {name: SqNorm([name]) for name in selection.names}
    probe = Probe(model, case.task(), reductions=reductions, skip_unsupported=True)
    found = probe(batch).reduced
    exact = torch.stack([_norms(model, case.task(), _alone(batch, b), probe.parameters) for b in range(SAMPLES)])
    mine = torch.stack([found[name] for name in probe.parameters], 1)
    scale = exact.amax(0).clamp(min=1e-3 * float(exact.max()))
    return Coverage(
        probe.coverage, float(((mine - exact).abs() / scale).max()), dict(selection.left_out) | probe.left_out
    )


def _norms(model: nn.Module, task: Task, sample: Any, names: list[str]) -> Tensor:
    """‖gradient‖² by parameter, of one sample."""
    parameters = dict(model.eval().named_parameters())
    loss = unfused(task).forward(model, sample).losses.sum()
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    return torch.stack([torch.zeros(()) if g is None else g.square().sum() for g in gradients])


def _alone(batch: Any, b: int) -> Any:
    if isinstance(batch, tuple):
        return tuple(_alone(part, b) for part in batch)
    return {key: value[b : b + 1] for key, value in batch.items()} if isinstance(batch, dict) else batch[b : b + 1]


def main() -> None:
    names = options.some(__doc__, "NAME", CASES)
    print("| architecture | tapped | error | left out |\n|---|---|---|---|")
    for name in names:
        print(f"| {name} | {_line(CASES[name]())} |", flush=True)


def _line(case: Case) -> str:
    try:
        found = cover(case)
    except (RuntimeError, ValueError) as error:  # says what went wrong, and the others go on
        return f"– | – | {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    left_out = ", ".join(f"`{layer}`" for layer in sorted(found.left_out)) or "–"
    return f"{found.share:.1%} | {found.error:.0e} | {left_out}"


if __name__ == "__main__":
    main()
