"""Adam's state comes from files with its names and constants, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import LESS
from assay.probe import AdamState
from assay.probe.learning_rates import LearningRates
from assay.tasks import CausalLM, Classification

BETAS, EPS = (0.9, 0.95), 1e-6


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(20, 6, generator=generator), torch.randint(3, (20,), generator=generator)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def stepped(model: nn.Module, parameters: object, **options: object) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, **{"betas": BETAS, "eps": EPS, **options})  # type: ignore[arg-type]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(batch()[0]), batch()[1]).backward()
        optimizer.step()
    model.zero_grad()
    return optimizer


def assert_same(state: AdamState, live: AdamState) -> None:
    assert (state.betas, state.eps, state.steps) == (live.betas, live.eps, live.steps)
    for ours, theirs in ((state.first, live.first), (state.second, live.second)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adam_without_memory_is_the_sign() -> None:
    state = AdamState({"w": torch.zeros(3)}, {"w": torch.zeros(3)}, betas=(0.0, 0.0), eps=0.0)
    assert state.step("w", torch.tensor([[2.0, -0.1, 5.0]])).tolist() == [[1.0, -1.0, 1.0]]


def test_the_step_is_that_of_torch(model: nn.Module) -> None:
    """The next step of torch's own Adam, up to the bias correction that LESS leaves out."""
    optimizer = stepped(model, model.parameters(), weight_decay=0.0, lr=1e-3)
    state = AdamState.of(optimizer, model)
    before = model[0].weight.detach().clone()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    gradient = model[0].weight.grad[None].clone()
    optimizer.step()
    moved = (before - model[0].weight.detach()) / 1e-3
    assert state.steps == 2
    one, two = (1 - beta**3 for beta in BETAS)
    corrected = AdamState(state.first, state.second, BETAS, EPS * two**0.5).step("0.weight", gradient)[0]
    torch.testing.assert_close(moved, corrected * two**0.5 / one, rtol=1e-3, atol=1e-4)


def test_every_file_of_one_state_gives_one_score(model: nn.Module, tmp_path: Path) -> None:
    optimizer = stepped(model, model.named_parameters())
    live = AdamState.of(optimizer, model)
    torch.save(optimizer.state_dict(), tmp_path / "named.pt")
    torch.save({"optimizer": optimizer.state_dict()}, tmp_path / "nested.pt")
    live.save(tmp_path / "saved.safetensors")
    states = [live, *(AdamState.load(tmp_path / name) for name in ("named.pt", "nested.pt", "saved.safetensors"))]
    scores = []
    for state in states:
        assert_same(state, live)
        assert (state.betas, state.eps, state.steps) == (BETAS, EPS, 2)
        method = LESS([model], Classification(), {"t": [batch()]}, optimizers=[state]).fit()
        scores.append(assay.score([batch()], [method])["less"].to_pylist())
    assert scores[1:] == scores[:1] * 3
    other = AdamState(live.first, live.second, (0.9, 0.999), EPS)  # what was assumed without a word
    method = LESS([model], Classification(), {"t": [batch()]}, optimizers=[other]).fit()
    assert assay.score([batch()], [method])["less"].to_pylist() != scores[0]


def test_constants_come_from_the_file_or_the_caller_and_from_nowhere_else(model: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    live = AdamState.of(stepped(model, model.named_parameters()), model)
    moments = {f"{n}.exp_avg": t for n, t in live.first.items()} | {
        f"{n}.exp_avg_sq": t for n, t in live.second.items()
    }
    path = tmp_path / "moments.safetensors"
    save_file(moments, path)
    with pytest.raises(ValueError, match=r"does not say the optimiser.s betas; pass betas=, or .* AdamState\.save"):
        AdamState.load(path)
    with pytest.raises(ValueError, match="does not say the optimiser's eps"):
        AdamState.load(path, betas=BETAS)
    loaded = AdamState.load(path, betas=list(BETAS), eps=EPS)
    assert (loaded.betas, loaded.eps, loaded.steps) == (BETAS, EPS, None)
    save_file(moments, path, {"betas": "[0.9, 0.95]", "eps": "1e-6"})
    assert AdamState.load(path, betas=BETAS).eps == EPS
    with pytest.raises(ValueError, match=r"says betas \[0\.9, 0\.95\], but betas=\(0\.9, 0\.999\) was given"):
        AdamState.load(path, betas=(0.9, 0.999))
    save_file(moments, path, {"betas": "0.9 and more", "eps": "1e-6"})
    with pytest.raises(ValueError, match=r"moments\.safetensors: cannot be read"):
        AdamState.load(path)
    save_file(moments, path, {"betas": "[0.9, 1.0]", "eps": "1e-6"})
    with pytest.raises(ValueError, match=r"moments\.safetensors: betas: expected two numbers in \[0, 1\), got"):
        AdamState.load(path)


def test_a_state_dict_without_constants_or_with_several_is_refused(model: nn.Module, tmp_path: Path) -> None:
    optimizer = stepped(model, model.named_parameters())
    saved, path = optimizer.state_dict(), tmp_path / "optimizer.pt"
    del saved["param_groups"][0]["betas"]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="does not say the optimiser's betas"):
        AdamState.load(path)
    assert AdamState.load(path, betas=BETAS).betas == BETAS
    groups = [
        {"params": list(model[0].named_parameters("0"))},
        {"params": list(model[2].named_parameters("2")), "betas": (0.5, 0.6)},
    ]
    several = stepped(model, groups)
    torch.save(several.state_dict(), path)
    for make in (lambda: AdamState.of(several, model), lambda: AdamState.load(path)):
        with pytest.raises(ValueError, match=r"groups differ in betas: \(0\.9, 0\.95\), \(0\.5, 0\.6\)"):
            make()
    for flag in ("amsgrad", "maximize"):
        with pytest.raises(ValueError, match=f"has {flag}=True"):
            AdamState.of(stepped(model, model.parameters(), **{flag: True}), model)


@pytest.mark.parametrize("other", [torch.optim.NAdam, torch.optim.RAdam])
def test_who_makes_other_steps_of_adams_moments_is_named(other: Any, model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    model(batch()[0]).sum().backward()
    optimizer = other(model.named_parameters())
    optimizer.step()
    torch.save(optimizer.state_dict(), path)
    for make in (lambda: AdamState.of(optimizer, model), lambda: AdamState.load(path)):
        with pytest.raises(ValueError, match=f"is {other.__name__}'s by its settings"):
            make()
    with pytest.raises(ValueError, match=f"optimizer: {other.__name__} scales gradients in a way that is not known"):
        LearningRates(optimizer, model, [name for name, _ in model.named_parameters()])


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: holds no Adam moments"):
        AdamState.load(tmp_path / "other.safetensors")
    torch.save({"state": {}, "param_groups": [{"params": [0]}]}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"empty\.pt: holds no Adam moments"):
        AdamState.load(tmp_path / "empty.pt", ["w"])
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: expected an optimiser's state_dict"):
        AdamState.load(tmp_path / "list.pt")
    for name in ("broken.pt", "broken.safetensors"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an optimiser's state"):
            AdamState.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        AdamState.load(tmp_path / "nowhere.pt")


def trainer_groups(model: nn.Module) -> list[dict[str, object]]:
    trainer = pytest.importorskip("transformers").Trainer
    decayed = set(trainer.get_decay_parameter_names(None, model))
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]


def language_model(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def of_trainer(model: nn.Module, path: Path, groups: list[dict[str, object]] | None = None) -> AdamState:
    """Train two steps as the Trainer does, write its ``optimizer.pt``, and return the live state."""
    optimizer = torch.optim.AdamW(groups or trainer_groups(model), betas=BETAS, eps=EPS)
    ids = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), path)
    return AdamState.of(optimizer, model)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_trainers_file_gets_its_names_from_the_model(kind: str, frozen: bool, tmp_path: Path) -> None:
    model, path = language_model(kind), tmp_path / "optimizer.pt"
    if frozen:
        next(model.parameters()).requires_grad_(False)
    live = of_trainer(model, path)
    with pytest.raises(ValueError, match="have numbers but no names; pass model="):
        AdamState.load(path)
    loaded = AdamState.load(path, model=model)
    assert_same(loaded, live)
    loaded.check(model, [n for n, p in model.named_parameters() if p.requires_grad])


def test_the_trainers_file_of_an_adapter(tmp_path: Path) -> None:
    """Only the adapter was trained, and only it is scored."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model, path = peft.get_peft_model(language_model("gpt2"), config), tmp_path / "optimizer.pt"
    live = of_trainer(model, path)
    state = AdamState.load(path, model=model)
    assert_same(state, live)
    assert all("lora_" in name for name in state.first)
    text = {"input_ids": torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(4))}
    method = LESS([model], CausalLM(), {"t": [text]}, optimizers=[state]).fit()
    assert set(method.parameters) == set(state.first)
    assert assay.score([text], [method])["less"].to_numpy().std() > 0


def test_a_trainers_file_of_before_it_knew_norms_by_name(tmp_path: Path) -> None:
    """Older versions went by the layer's class and by "bias" alone."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model = language_model("gpt2")
    model.transformer.ln_f = nn.Sequential()
    model.transformer.ln_f.norm = Scale()
    names = [n for n, _ in model.named_parameters()]
    plain = {n for n in names if "bias" in n or ".ln_1." in n or ".ln_2." in n}
    known = dict(model.named_parameters())
    groups = [{"params": [known[n] for n in names if (n in plain) == side]} for side in (False, True)]
    live = of_trainer(model, tmp_path / "optimizer.pt", groups)
    assert_same(AdamState.load(tmp_path / "optimizer.pt", model=model), live)


def test_one_group_is_in_the_models_order(model: nn.Module, tmp_path: Path) -> None:
    optimizer = stepped(model, model.parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert_same(AdamState.load(tmp_path / "optimizer.pt", model=model), AdamState.of(optimizer, model))
    names = [name for name, _ in model.named_parameters()]
    assert_same(AdamState.load(tmp_path / "optimizer.pt", names), AdamState.of(optimizer, model))


def test_a_model_that_the_file_is_not_of_is_told_how(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    of_trainer(language_model("gpt2"), path)
    with pytest.raises(ValueError, match=r"groups of \[\d+, \d+\] parameters, the model .* \[\d+, \d+\]; pass names="):
        AdamState.load(path, model=language_model("llama"))
    torch.save(stepped(model, model.parameters()).state_dict(), path)
    other = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    with pytest.raises(
        ValueError, match=r"parameter 0, by its place '0\.weight', has shape \(5, 6\) in the file, \(4, 6\)"
    ):
        AdamState.load(path, model=other)


def test_two_orders_that_fit_are_not_guessed_between(tmp_path: Path) -> None:
    class RMSNorm(nn.Linear):
        pass

    model = nn.Module()
    model.norm, model.scale, model.linear = nn.Linear(2, 2, False), RMSNorm(2, 2, False), nn.Linear(2, 2, False)
    groups = [{"params": [model.scale.weight, model.linear.weight]}, {"params": [model.norm.weight]}]
    optimizer = torch.optim.AdamW(groups)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="fit more than one order"):
        AdamState.load(tmp_path / "optimizer.pt", model=model)


def test_moments_of_weights_that_the_model_ties_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4, False), nn.Linear(4, 4, False))
    moments = {n: torch.ones(4, 4) for n, _ in model.named_parameters()}
    state = AdamState(moments, moments)
    state.check(model, ["0.weight", "1.weight"])
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"moments of both '0\.weight' and '1\.weight', which are one tensor"):
        state.check(model, ["0.weight"])
    with pytest.raises(ValueError, match=r"no exp_avg for parameter '0\.weight'"):
        AdamState({}, {}).check(model, ["0.weight"])


def test_constants_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\)"):
        AdamState({}, {}, betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="eps: expected a number of at least 0"):
        AdamState({}, {}, eps=-1e-8)
