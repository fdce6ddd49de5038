"""Tiny random models of many architectures: 16 wide, 2 layers, 97 tokens or images of 16 × 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

TOKENS = 97
_TEXT = {"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_CAUSAL = _TEXT | {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}
_T5 = {"num_layers": 2, "num_heads": 2, "pad_token_id": 0, "decoder_start_token_id": 0}
_BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
_SIDES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def config(name: str, **changes: Any) -> Any:
    """A config of the architecture ``name``; ``changes`` replace its keys."""
    kind, values = {
        "bert": ("BertConfig", _TEXT | {"intermediate_size": 24, "max_position_embeddings": 64}),
        "distilbert": (
            "DistilBertConfig",
            {"vocab_size": TOKENS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        ),
        "gpt2": ("GPT2Config", {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        "llama": ("LlamaConfig", _CAUSAL),
        "qwen2": ("Qwen2Config", _CAUSAL | {"tie_word_embeddings": True}),
        "gemma2": ("Gemma2Config", _CAUSAL | {"head_dim": 8, "final_logit_softcapping": 2.0}),
        "t5": (
            "T5Config",
            {"vocab_size": TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24} | _T5,
        ),
        "bart": ("BartConfig", {"vocab_size": TOKENS, "d_model": 16, **_BART}),
        "vit": ("ViTConfig", _SIDES | {"image_size": 16, "patch_size": 8}),
        "resnet": (
            "ResNetConfig",
            {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        ),
        "siglip": (
            "SiglipConfig",
            {
                "text_config": _SIDES | {"vocab_size": TOKENS, "max_position_embeddings": 12, "projection_size": 16},
                "vision_config": _SIDES | {"image_size": 16, "patch_size": 8},
            },
        ),
        "siglip2": (
            "Siglip2Config",
            {
                "text_config": _SIDES | {"vocab_size": TOKENS, "max_position_embeddings": 12, "projection_size": 16},
                "vision_config": _SIDES | {"num_patches": 4, "patch_size": 8},
            },
        ),
        "dual": (  # takes images of any size
            "VisionTextDualEncoderConfig",
            {
                "text_config": _SIDES | {"model_type": "bert", "vocab_size": TOKENS, "max_position_embeddings": 32},
                "vision_config": _SIDES | {"model_type": "dinov2", "image_size": 16, "patch_size": 8},
                "projection_dim": 12,
            },
        ),
        "clip": (
            "CLIPConfig",
            {
                "text_config": _SIDES | {"vocab_size": TOKENS, "max_position_embeddings": 32, "eos_token_id": 96},
                "vision_config": _SIDES | {"image_size": 16, "patch_size": 8},
                "projection_dim": 12,
            },
        ),
    }[name]
    common = {} if name in ("resnet", "clip", "dual", "siglip", "siglip2") else {"bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        common["pad_token_id"] = 0
    return getattr(transformers, kind)(**(common | values | changes))


def save(path: Path, name: str, auto_class: str, seed: int = 0, size: str = "1GB", **changes: Any) -> Any:
    """Save a random model whose outputs are not small; returns it, in eval mode."""
    torch.manual_seed(seed)
    cls = transformers.T5EncoderModel if (name, auto_class) == ("t5", "AutoModel") else None
    made = config(name, **changes)
    model = cls(made) if cls else getattr(transformers, auto_class).from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, max_shard_size=size)
    return model.eval()
