"""What scoring takes for granted of a language model is tried out when it is loaded."""

from __future__ import annotations

import json
import time
import warnings

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    RobertaConfig,
)

from assay import cli
from assay.engine import make_plan, open_workshop, run
from assay.recipe.causal_checks import check_causal_lm
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from tests.small_models import SIZES, llama_config, save_model, write_recipe

TOKENS = range(257)


def phi3(**changes) -> Phi3Config:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return Phi3Config(
        **(
            SIZES
            | {"intermediate_size": 64, "num_key_value_heads": 4, "pad_token_id": 256, "max_position_embeddings": 96}
        ),
        original_max_position_embeddings=24,
        rope_scaling=factors | {"type": "longrope", "rope_theta": 10000.0},
        **changes,
    )


def build(config) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


GOOD = {
    "llama": llama_config(),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4),
    "bloom": BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4),
    "opt": OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128),
    "mamba": MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=32, num_key_value_heads=2, num_local_experts=4),
    "roberta decoder": RobertaConfig(**SIZES, intermediate_size=64, is_decoder=True, max_position_embeddings=130),
    "bert decoder": BertConfig(**SIZES, intermediate_size=64, is_decoder=True),
    "dynamic": llama_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
}


@pytest.mark.parametrize("name", GOOD)
def test_causal_models_pass_and_tell_their_classes(name):
    model = build(GOOD[name])
    started = time.monotonic()
    assert check_causal_lm("models.m", model, TOKENS, 96) == 257
    assert time.monotonic() - started < 10  # 0.1 s on a quiet machine
    assert not model.training


def test_an_encoder_is_refused():
    with pytest.raises(EngineError, match=r"models\.m: a later token changes the logits before it"):
        check_causal_lm("models.m", build(BertConfig(**SIZES, intermediate_size=64)), TOKENS, 64)


class Averaging(nn.Module):
    """Talks while it runs; causal within a text, but its logits depend on what else is in the batch."""

    def __init__(self, over: str) -> None:
        super().__init__()
        self.over = over
        self.embedding, self.head = nn.Embedding(257, 16), nn.Linear(16, 257)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, attention_mask=None):
        print("\x1b[31mloud")
        warnings.warn("loud", stacklevel=1)
        hidden = self.embedding(input_ids)
        if self.over == "batch":
            hidden = hidden + hidden[:, :1].mean(0, keepdim=True)
        elif self.over == "length":
            hidden = hidden * (1 + input_ids.shape[1] // 40)
        return self.head(self.dropout(hidden))


def test_plain_modules_are_tried_out_too(capfd):
    model = Averaging("").train()
    model.embedding.eval()
    assert check_causal_lm("models.m", model, TOKENS, 64) == 257
    assert model.training
    assert model.dropout.training
    assert not model.embedding.training
    assert capfd.readouterr() == ("", "")


def test_what_neighbours_change_is_refused():
    with pytest.raises(
        EngineError, match=r"models\.m: a text in a batch with a longer one gets other logits than alone"
    ):
        check_causal_lm("models.m", Averaging("batch"), TOKENS, 64)


def test_what_the_batchs_length_changes_is_refused_with_the_longest_that_does_not():
    message = (
        r"models\.m: a text gets other logits beside one of 64 tokens than alone .* task\.max_length to at most 39"
    )
    with pytest.raises(EngineError, match=message):
        check_causal_lm("models.m", Averaging("length"), TOKENS, 64)
    assert check_causal_lm("models.m", Averaging("length"), TOKENS, 39) == 257


def test_longrope_is_refused_beyond_its_threshold_and_right_below(tmp_path, capfd):
    save_model(tmp_path / "phi", config=phi3())
    path = str(write_recipe(tmp_path, {"phi": tmp_path / "phi"}))
    capfd.readouterr()
    assert cli.main(["validate", path]) == cli.BAD
    error = capfd.readouterr().err
    assert error.startswith("assay: models.phi: a text gets other logits beside one of 32 tokens than alone")
    assert error.endswith("set task.max_length to at most 24\n")
    run(load_recipe(path, ["task.max_length=24"]))
    run(load_recipe(path, ["task.max_length=24", "batch.samples=1", "output=single"]))
    together, single = (pq.read_table(tmp_path / f"{name}/a.parquet")["ensemble_nll"] for name in ("scores", "single"))
    assert together.to_pylist() == pytest.approx(single.to_pylist(), rel=1e-4)


def test_validate_refuses_an_encoder(tmp_path):
    save_model(tmp_path / "bert", config=BertConfig(**SIZES, intermediate_size=64))
    recipe = load_recipe(str(write_recipe(tmp_path, {"bert": tmp_path / "bert"})))
    with pytest.raises(EngineError, match=r"models\.bert: a later token changes"):
        open_workshop(make_plan(recipe), fit=False)


def test_a_model_that_cannot_run_is_refused(tmp_path):
    class Broken(nn.Module):
        def forward(self, input_ids):
            raise ZeroDivisionError(json.dumps("x" * 1000))

    with pytest.raises(EngineError, match=r"models\.m: cannot be run on token ids; .*ZeroDivisionError") as caught:
        check_causal_lm("models.m", Broken(), TOKENS, 64)
    assert len(str(caught.value)) < 500
