"""Whole architectures with random weights against torch.func: every parameter's per-sample gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from assay.probe import PerSampleGradient, Probe, SqNorm, tapped_parameters
from assay.probe.recording import Recorder
from assay.tasks import CausalLM, Classification, Contrastive, Regression
from tests.probe.probe_oracle import check_probe, close, jacobian

transformers = pytest.importorskip("transformers")

VOCABULARY = 13


def cross_entropy(run: Any, batch: Any) -> Tensor:
    return F.cross_entropy(run(batch[0]), batch[1], reduction="none")


def next_token(run: Any, batch: Any) -> Tensor:
    """Mean cross entropy of the real tokens, written with a loop over samples."""
    logits = run(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses = []
    for z, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        losses.append(F.cross_entropy(z[: length - 1], ids[1:length]))
    return torch.stack(losses)


def text_batch(*lengths: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that every gradient is, biases and norms included."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model.double()


def gpt2(tied: bool = True) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=tied,
        attn_implementation="eager",  # forward mode has no formula for the fused attention
    )
    return randomise(transformers.GPT2LMHeadModel(config))


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return randomise(transformers.LlamaForCausalLM(config))


class Reused(nn.Module):
    """An MLP that runs one hidden layer three times and shares its weight with yet another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden = nn.Linear(4, 6), nn.Linear(6, 6)
        self.twin, self.never, self.head = nn.Linear(6, 6), nn.Linear(2, 2), nn.Linear(6, 3)
        self.twin.weight = self.hidden.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        for _ in range(3):
            h = self.hidden(h).tanh()
        dead_end = self.hidden(h)  # a call that the loss does not depend on
        return self.head(self.twin(h).tanh() + 0 * dead_end.detach())


def test_reused_and_shared_layers() -> None:
    model = randomise(Reused())
    batch = torch.randn(5, 4).double(), torch.randint(3, (5,))
    signals = check_probe(model, Classification(), batch, cross_entropy)
    assert signals.factors["hidden"].inputs.shape == (5, 3, 6)
    assert "never" not in signals.factors
    assert tapped_parameters(model, "twin.weight") == ["hidden.weight"]


class Block(nn.Module):
    def __init__(self, inner: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(4, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 1)
        self.inner, self.relu = inner, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv(x))  # in place on a tapped output
        h = self.relu(self.norm(self.inner(h)))
        h = self.out(h)
        h += x  # in place again, and a view below
        h[:, 0].mul_(2)
        return self.relu(h)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.grouped = Block(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8))
        self.depthwise = Block(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.grouped(self.stem(x)))
        return self.head(self.dropout(h.mean((2, 3))))


def test_resnet_in_training_mode_with_inplace_relu() -> None:
    model = randomise(ResNet()).train()
    batch = torch.randn(4, 2, 9, 9).double(), torch.randint(3, (4,))
    check_probe(model, Classification(), batch, cross_entropy)


def test_an_inplace_relu_directly_on_the_first_tapped_layer() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
    check_probe(model, Classification(), (torch.randn(5, 4).double(), torch.randint(3, (5,))), cross_entropy)


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied: bool) -> None:
    check_probe(gpt2(tied), CausalLM(), text_batch(7, 3, 5), next_token)


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    # Its norms compute in float32 whatever the weights are.
    check_probe(llama(tied), CausalLM(), text_batch(7, 3, 5), next_token, tolerance=2e-5)


def test_tied_weights_of_one_sample() -> None:
    check_probe(gpt2(), CausalLM(), text_batch(6), next_token)


def test_lora_taps_the_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).double()
    names = tapped_parameters(model)
    assert len(names) == 2 * 2 * 2
    assert all("lora_" in name for name in names)
    check_probe(model, CausalLM(), text_batch(7, 3, 5), next_token, tolerance=2e-5)


def test_vision_transformer() -> None:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=4,
        num_channels=2,
        num_labels=3,
        attn_implementation="eager",
    )
    model = randomise(transformers.ViTForImageClassification(config))
    with pytest.raises(ValueError, match=r"'vit\.embeddings\.cls_token': layer 'vit\.embeddings' \(ViTEmbeddings\)"):
        Probe(model, Classification())  # a class token has no factors
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= set(tapped_parameters(model))
    batch = torch.randn(3, 2, 8, 8).double(), torch.randint(3, (3,))

    def losses(run: Any, batch: Any) -> Tensor:
        return F.cross_entropy(run(batch[0]).logits, batch[1], reduction="none")

    # The keys' bias has gradient zero but for the rounding of an attention in float32.
    check_probe(model, Classification(), batch, losses, tolerance=1e-6)


def test_regression() -> None:
    model = randomise(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    batch = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    check_probe(model, Regression(), batch, lambda run, b: ((run(b[0]) - b[1]) ** 2).mean(1))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, float]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1), 5.0


def test_contrastive_gradients_hold_the_other_samples_fixed() -> None:
    def losses(run: Any, batch: Any) -> Tensor:
        image, text, scale = run(*batch)
        out = []
        for b in range(len(image)):  # constants everywhere but at b
            others_image, others_text = image.detach().clone(), text.detach().clone()
            others_image[b], others_text[b] = image[b], text[b]
            row, column = scale * others_text @ image[b], scale * others_image @ text[b]
            out.append((row.logsumexp(0) + column.logsumexp(0)) / 2 - scale * image[b] @ text[b])
        return torch.stack(out)

    batch = torch.randn(4, 4).double(), torch.randn(4, 5).double()
    check_probe(randomise(TwoTowers()), Contrastive(), batch, losses, forward_mode=False)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(
            nn.Linear(6, 6), nn.Sigmoid(), nn.LayerNorm(6), nn.ReLU(inplace=True), nn.Linear(6, 6)
        )

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        h = self.first(x)
        h = self.block(h) if plain else checkpoint(self.block, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("layers", ["*", "block.*", "block.4"])
def test_checkpointing_recomputes_the_same_graph(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Checkpointed(reentrant=False))
    batch = torch.randn(5, 4).double(), torch.randint(3, (5,))
    expected = jacobian(model, lambda run, b: F.cross_entropy(run(b[0], plain=True), b[1], reduction="none"), batch)
    names = tapped_parameters(model, layers)
    watched: list[str] = []
    watch = Recorder._watch
    monkeypatch.setattr(
        Recorder, "_watch", lambda self, call, *rest: (watched.append(call.tap.layer), watch(self, call, *rest))
    )
    signals = Probe(model, Classification(), reductions={n: SqNorm([n]) for n in names})(batch)
    assert len(watched) == len(set(watched))  # the recomputation is not another call
    for name in names:
        close(signals.reduced[name], expected[name].square().flatten(1).sum(1), 1e-10, name)


def test_reentrant_checkpointing_is_refused() -> None:
    model = randomise(Checkpointed(reentrant=True))
    batch = torch.randn(5, 4).double(), torch.randint(3, (5,))
    with pytest.raises(RuntimeError, match=r"use_reentrant=False"):  # torch's own words: the self-check runs first
        Probe(model, Classification())(batch)
    with pytest.raises(RuntimeError, match=r"'block\.0' ran without gradients.*use_reentrant=False"):
        Probe(model, Classification(), verify=False)(batch)


def test_autocast_gradients_are_those_of_the_model_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 3))
    x, y = torch.randn(6, 16), torch.randint(3, (6,))
    names = tapped_parameters(model)
    with torch.autocast("cpu", torch.bfloat16):
        probe = Probe(model, Classification(), factors="*", reductions={n: SqNorm([n]) for n in names})
        signals = probe((x, y))
        total = [F.cross_entropy(model(x[b : b + 1]).float(), y[b : b + 1]) for b in range(6)]
    assert signals.factors["0"].inputs.dtype == torch.float32
    assert signals.factors["3"].grads.dtype == torch.bfloat16
    for b, loss in enumerate(total):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for name, gradient in zip(names, gradients, strict=True):
            # both round to bfloat16 (8 bits) at every layer, in different places
            torch.testing.assert_close(signals.reduced[name][b], gradient.square().sum(), rtol=0.05, atol=1e-6)


def test_reductions_compute_outside_of_the_callers_autocast() -> None:
    class Spy:
        parameters = ("0.weight",)
        enabled: bool | None = None

        def __call__(self, parameter: str, gradient: PerSampleGradient) -> Tensor:
            self.enabled = torch.is_autocast_enabled("cpu")
            return gradient.sqnorm()

    spy, model = Spy(), nn.Sequential(nn.Linear(4, 3))
    with torch.autocast("cpu", torch.bfloat16):
        Probe(model, Classification(), reductions={"spy": spy})((torch.randn(2, 4), torch.tensor([0, 1])))
    assert spy.enabled is False
