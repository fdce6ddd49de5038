"""Online scores and weighted gradients are those of torch.func, one sample at a time."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import assay
from assay.methods import LESS, TRAK, AdamState, Ensemble, GradMimic, GraNd, direction
from assay.probe import PerSampleGradient, Probe, SqNorm
from assay.tasks import Classification
from assay.train import Reweighter
from tests.train.small_models import moved

TASK = Classification()


class Net(nn.Module):
    """A convolution, a norm, a shared table of positions and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(2, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.places = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.stem(x).mT) + self.places(torch.arange(5)[None])
        return self.head(F.relu(h, inplace=True).mean(1))


class Normed(Net):
    """With a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.batch(self.stem(x)).mean(2))


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 5), torch.randint(3, (6,))


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    model = Net()
    return model, moved(model, by=0.1)


def losses_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


def by_sample(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """(B, *shape) by parameter, from as many backward passes as samples."""
    each = []
    for x, y in zip(*data, strict=True):
        own = copy.deepcopy(model)
        loss = losses_of(own, (x[None], y[None])).sum()
        each.append(torch.autograd.grad(loss, list(own.parameters())))
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack([grads[i] for grads in each]) for i, name in enumerate(names)}


def mimic(gradients: dict[str, Tensor], model: nn.Module, reference: nn.Module, names: list[str]) -> Tensor:
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    steps = {name: (theirs[name] - ours[name]).detach().double() for name in names}
    norm = sum(float(v.square().sum()) for v in steps.values()) ** 0.5
    return -sum((gradients[n].double() * v).flatten(1).sum(1) for n, v in steps.items()) / norm


def close_gradients(model: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(p.grad.double(), expected[name].double(), rtol=rtol, atol=rtol * scale, msg=name)


def mixed(gradients: dict[str, Tensor], weights: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What .grad should be."""
    flat = torch.ones_like(weights)
    return {
        name: torch.einsum("b,b...->...", (weights if name in names else flat).to(g), g) / len(weights)
        for name, g in gradients.items()
    }


EVERY = [name for name, _ in Net().named_parameters()]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("layers", "reweighted"), [(None, EVERY), ("head", ["head.weight", "head.bias"]), ("stem", EVERY[:2])]
)
@pytest.mark.parametrize("scored", [None, "head"])
def test_gradients_and_scores(models, data, layers, reweighted, scored, recompute) -> None:
    model, reference = models
    method = GradMimic(model, reference, TASK, layers=scored)
    names = EVERY if scored is None else ["head.weight", "head.bias"]
    gradients = by_sample(model, data)
    reweighter = Reweighter(model, method, temperature=0.3, layers=layers, recompute=recompute)
    reweighter.backward(losses_of(model, data), ids=range(6))
    scores = mimic(gradients, model, reference, names)
    weights = 6 * (scores / 0.3).softmax(0)
    close_gradients(model, mixed(gradients, weights, reweighted))
    torch.testing.assert_close(reweighter.weights, weights.float(), rtol=1e-4, atol=1e-5)
    table = reweighter.table()
    assert table["id"].to_pylist() == list("012345")
    assert table.column_names == ["id", "step", "mimic", "loss", "weight"]  # no reference ran
    torch.testing.assert_close(torch.tensor(table["mimic"].to_pylist()), scores.float(), rtol=1e-4, atol=1e-6)


def test_equal_weights_are_an_ordinary_step(models, data) -> None:
    model, reference = models
    plain = copy.deepcopy(model)
    losses_of(plain, data).mean().backward()
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), mode="filter", keep=1.0)
    reweighter.backward(losses_of(model, data))
    close_gradients(model, {name: p.grad for name, p in plain.named_parameters()})


def test_a_step_makes_each_direction_once_and_each_gradient_once(models, data, monkeypatch) -> None:
    made, given = [], {}
    step, weighted = direction._step, PerSampleGradient.weighted

    def counted(ours: Tensor, theirs: Tensor) -> Tensor:
        made.append(ours)
        return step(ours, theirs)

    def noted(gradient: PerSampleGradient, factors: Tensor) -> Tensor:
        found = weighted(gradient, factors)
        given[found.data_ptr()] = found.shape
        return found

    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK))
    reweighter.backward(losses_of(model, data))  # the first step looks at all of them, for its check
    model.zero_grad()
    monkeypatch.setattr(direction, "_step", counted)
    monkeypatch.setattr(PerSampleGradient, "weighted", noted)
    reweighter.backward(losses_of(model, data))
    assert sorted(map(id, made)) == sorted(map(id, model.parameters()))
    assert {p.grad.data_ptr(): p.grad.shape for p in model.parameters()} == given  # taken, not copied


def test_sums_of_gradients_are_not_under_the_callers_autocast() -> None:
    """Autograd's thread for a GPU would not even know which type it is, and multiply in float16."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x, y = torch.randn(6, 3, 64), torch.randint(64, (6, 3))
    reweighter = Reweighter(model, GraNd(model, TASK))
    found = []
    for under in (False, True):
        model.zero_grad()
        losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(6, 3).mean(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            reweighter.backward(losses)
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(plain, own) for plain, own in zip(*found, strict=True))


class Bare(nn.Module):
    """Parameters of the model's own: a class token, places, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 2)), nn.Parameter(torch.randn(1, 6, 2))
        self.scale, self.head = nn.Parameter(torch.randn(2)), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x.mT], 1) + self.places
        return self.head((h + self.scale * h.tanh()).mean(1))


@pytest.mark.parametrize("size", [6, 1])
@pytest.mark.parametrize(("mode", "layers"), [("observe", None), ("filter", "head"), ("filter", None)])
def test_bare_parameters_that_are_scored_get_the_plain_mean(data, mode, layers, size) -> None:
    model, data = Bare(), (data[0][:size], data[1][:size])
    losses_of(model, data).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    keep = 1.0 if mode == "filter" else None
    Reweighter(model, GraNd(model, TASK), mode=mode, keep=keep, layers=layers).backward(losses_of(model, data))
    close_gradients(model, expected)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("make", [Net, Bare])
def test_nothing_of_a_step_is_kept(data, make, recompute) -> None:
    """Not even until Python looks for cycles: on a GPU that may be many steps."""
    model = make()
    reweighter = Reweighter(model, GraNd(model, TASK), recompute=recompute)
    gc.collect()
    gc.disable()
    try:
        tensors = set()
        for _ in range(3):
            model.zero_grad()
            reweighter.backward(losses_of(model, data))
            tensors.add(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
        losses_of(model, data)  # and no backward pass
        reweighter.detach()
        tensors.add(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert len(tensors) == 1


def test_the_direction_follows_the_weights(models, data) -> None:
    model, reference = models
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    reweighter = Reweighter(model, GradMimic(model, reference, TASK, layers="head"), layers="head")
    for step in range(3):
        optimizer.zero_grad()
        gradients = by_sample(detached(model), data)
        expected = mimic(gradients, model, reference, ["head.weight", "head.bias"])
        reweighter.backward(losses_of(model, data))
        found = torch.tensor(reweighter.table()["mimic"].to_pylist()[6 * step :])
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
        optimizer.step()


def detached(model: nn.Module) -> nn.Module:
    """A copy without hooks."""
    other = Net()
    other.load_state_dict(model.state_dict())
    return other


def test_accumulation_and_a_scaler(models, data) -> None:
    """Two micro-batches of different scale add up; scores are those of the losses themselves."""
    model, reference = models
    gradients = by_sample(model, data)
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), temperature=0.3)
    scores = mimic(gradients, model, reference, EVERY)
    for part, scale in ((slice(0, 4), 1024.0), (slice(4, 6), torch.tensor([512.0, 2048.0]))):
        reweighter.backward(losses_of(model, (data[0][part], data[1][part])), scale=scale)
    expected = {}
    first, second = 4 * (scores[:4] / 0.3).softmax(0), 2 * (scores[4:] / 0.3).softmax(0)
    for name, g in gradients.items():
        shares = torch.cat([first * 1024 / 4, second * torch.tensor([512.0, 2048.0]) / 2])
        expected[name] = torch.einsum("b,b...->...", shares, g.double())
    close_gradients(model, expected, 2e-5)
    torch.testing.assert_close(
        torch.tensor(reweighter.table()["mimic"].to_pylist()), scores.float(), rtol=1e-4, atol=1e-6
    )


def test_observing_changes_nothing(models, data) -> None:
    model, _ = models
    plain = copy.deepcopy(model)
    losses_of(plain, data).mean().backward()
    gradients = by_sample(model, data)
    reweighter = Reweighter(model, GraNd(model, TASK), mode="observe", every=2)
    for _ in range(3):
        model.zero_grad()
        reweighter.backward(losses_of(model, data))
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    norms = sum(g.double().square().flatten(1).sum(1) for g in gradients.values()).sqrt()
    table = reweighter.table()
    assert table["step"].to_pylist() == [1] * 6 + [3] * 6
    torch.testing.assert_close(torch.tensor(table["grand"].to_pylist()[:6]), norms.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_an_adam_step_is_of_the_samples_own_gradient_however_losses_are_scaled(data, scale) -> None:
    model = Net()
    first, second = ({n: 0.01 * torch.rand_like(p) for n, p in model.named_parameters()} for _ in "mv")
    method = LESS([model], TASK, {"t": [data]}, optimizers=[AdamState(first, second)]).fit()
    expected = assay.score([data], [method])["less"].to_numpy()
    reweighter = Reweighter(model, method, mode="observe")
    reweighter.backward(losses_of(model, data), scale=scale)
    np.testing.assert_allclose(reweighter.table()["less"].to_numpy(), expected, rtol=1e-4, atol=1e-5)


class Token(nn.Module):
    """A parameter that the model adds as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.flatten(1) + self.token).tanh())


@pytest.mark.parametrize("options", [{"mode": "observe"}, {"layers": "head", "temperature": 1e9}])
def test_a_parameter_that_is_scored_alone_gets_the_plain_mean(options, data) -> None:
    model = Token()
    plain, reference = copy.deepcopy(model), Token()
    losses_of(plain, data).mean().backward()
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), **options)
    reweighter.backward(losses_of(model, data))
    close_gradients(model, {name: p.grad for name, p in plain.named_parameters()})


def test_filter_keeps_the_best_share(models, data) -> None:
    model, reference = models
    gradients = by_sample(model, data)
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), mode="filter", keep=0.5)
    reweighter.backward(losses_of(model, data))
    scores = mimic(gradients, model, reference, EVERY)
    weights = torch.zeros(6).index_fill(0, scores.topk(3).indices, 2.0)
    assert torch.equal(reweighter.weights, weights)
    close_gradients(model, mixed(gradients, weights, EVERY))


def test_a_column_that_is_kept_low_counts_turned(models, data) -> None:
    model, reference = models
    method = GradMimic(model, reference, TASK, layers="head")
    reweighter = Reweighter(model, method, by="reference_loss", mode="filter", keep=1 / 6, layers="head")
    own = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    reweighter.backward(losses_of(model, data), reference_losses=own)
    assert reweighter.weights.tolist() == [0, 6, 0, 0, 0, 0]
    assert reweighter.table()["rho"].null_count == 0


def test_rho(models, data) -> None:
    model, reference = models
    with torch.no_grad():
        theirs = losses_of(reference, data)
    reweighter = Reweighter(model, GradMimic(model, reference, TASK, layers="head"), by="rho", temperature=1.0)
    losses = losses_of(model, data)
    reweighter.backward(losses, reference_losses=theirs)
    torch.testing.assert_close(reweighter.weights, 6 * (losses.detach() - theirs).softmax(0))


def test_el2n_from_logits(models, data) -> None:
    model, _ = models
    reweighter = Reweighter(model, Ensemble([model], TASK), by="ensemble_el2n", mode="observe")
    logits = model(data[0])
    reweighter.backward(F.cross_entropy(logits, data[1], reduction="none"), logits=logits, labels=data[1])
    expected = (logits.softmax(1) - F.one_hot(data[1], 3)).norm(dim=1)
    found = torch.tensor(reweighter.table()["ensemble_el2n"].to_pylist())
    torch.testing.assert_close(found, expected.detach())


def test_warmup_is_plain_and_evaluations_are_none_of_its_business(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), warmup_steps=1)
    plain = copy.deepcopy(model)
    losses_of(plain, data).mean().backward()
    reweighter.backward(losses_of(model, data))
    close_gradients(model, {name: p.grad for name, p in plain.named_parameters()})
    assert reweighter.weights is None
    losses = losses_of(model, data)
    model.eval()
    losses_of(model, data)  # forgot no_grad
    with torch.no_grad():
        losses_of(model, data)
    model.train()
    reweighter.backward(losses)
    assert reweighter.table().num_rows == 6


def test_state(models, data) -> None:
    model, reference = models
    one = Reweighter(model, GradMimic(model, reference, TASK), warmup_steps=1)
    for _ in range(3):
        one.backward(losses_of(model, data), ids=list("abcdef"))
    one.detach()
    other = Reweighter(model, GradMimic(model, reference, TASK), warmup_steps=1)
    other.load_state_dict(one.state_dict())
    assert other.step == 3
    assert other.table().equals(one.table())
    other.backward(losses_of(model, data), ids=list("abcdef"))
    assert other.table()["step"].to_pylist()[-6:] == [4] * 6


def test_hooks_of_parameters_run_once(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK, layers="head"), layers="head")
    counts: dict[str, int] = {}
    for name, p in model.named_parameters():
        p.register_hook(lambda g, name=name: counts.__setitem__(name, counts.get(name, 0) + 1))
    reweighter.backward(losses_of(model, data))  # the first step checks itself
    counts.clear()
    reweighter.backward(losses_of(model, data))
    assert counts == dict.fromkeys(EVERY, 1)


def test_under_autocast(models, data) -> None:
    model, reference = models
    gradients = by_sample(model, data)
    reweighter = Reweighter(model, GradMimic(model, reference, TASK, layers="head"), layers="head", temperature=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, data).float()
    reweighter.backward(losses)
    weights = 6 * (mimic(gradients, model, reference, ["head.weight", "head.bias"]) / 0.3).softmax(0)
    close_gradients(model, mixed(gradients, weights, ["head.weight", "head.bias"]), 5e-2)


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_with_adapters_and_checkpoints(tied: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(17, (4, 6))

    def losses(rows: Tensor) -> Tensor:
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits.mT, rows[:, 1:], reduction="none").mean(1)

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    each = []
    for row in ids:
        model.zero_grad()
        losses(row[None]).sum().backward()
        each.append([p.grad for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    gradients = {name: torch.stack([grads[i] for grads in each]) for i, name in enumerate(names)}
    reweighter = Reweighter(model, GraNd(model, TASK), temperature=2.0)
    for _ in range(2):
        model.zero_grad()
        reweighter.backward(losses(ids))
    norms = sum(g.double().square().flatten(1).sum(1) for g in gradients.values()).sqrt()
    weights = 4 * (norms / 2.0).softmax(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            expected = torch.einsum("b,b...->...", weights, gradients[name].double()) / 4
            torch.testing.assert_close(p.grad.double(), expected, rtol=1e-4, atol=1e-7, msg=name)


def test_a_grad_scaler_skips_what_overflows_and_goes_on() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2))
    x, y = torch.randn(8, 8), torch.randint(2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, backoff_factor=2.0**-10)
    reweighter, skipped = Reweighter(model, GraNd(model, TASK, layers="2"), layers="2"), []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = F.cross_entropy(model(x), y, reduction="none").float()
        before = model[2].weight.clone()
        reweighter.backward(losses, scale=scaler.scale(losses.new_ones(())))
        scaler.step(optimizer)
        scaler.update()
        skipped.append(torch.equal(model[2].weight, before))
    assert skipped == [True, False, False]
    table = reweighter.table()
    assert table["step"].to_pylist() == [2] * 8 + [3] * 8  # of a step that is skipped there is nothing to tell
    assert set(table["weight"].to_pylist()) != {1.0}


def test_infinite_scores_are_no_overflow_of_a_scale(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK))
    reference.load_state_dict(model.state_dict())  # no direction
    for scale in (1.0, 1024.0):
        with pytest.raises(RuntimeError, match=r"score 'mimic' is (NaN|infinite)"):
            reweighter.backward(losses_of(model, data), scale=scale)


def test_small_layers_in_sixteen_bits_pass_the_check() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reweighter = Reweighter(model, GraNd(model, TASK))
            losses = F.cross_entropy(model(torch.randn(8, 8)).float(), torch.randint(2, (8,)), reduction="none")
        reweighter.backward(losses)


class Last(nn.Module):
    """Sequences by a recurrent layer, whose weights are followed from product to product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0].mean(1))


def test_weights_that_are_followed_in_sixteen_bits_pass_the_check() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        model = Last()
        reweighter = Reweighter(model, GraNd(model, TASK, "layer"), layers="layer")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = F.cross_entropy(model(torch.randn(8, 5, 8)).float(), torch.randint(3, (8,)), reduction="none")
        reweighter.backward(losses)


class Placed(nn.Module):
    """Ids of places are as many as tokens, and in one batch as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Embedding(5, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.mT + self.places(torch.arange(5))).tanh().mean(1))


@pytest.mark.parametrize("sizes", [(6, 5), (6, 1, 5, 1)])
def test_a_batch_as_long_as_its_samples(data, sizes) -> None:
    model = Placed()
    reweighter = Reweighter(model, GraNd(model, TASK), temperature=0.1)
    for size in sizes:
        part, plain = (data[0][:size], data[1][:size]), Placed()
        plain.load_state_dict(model.state_dict())
        model.zero_grad()
        reweighter.backward(losses_of(model, part))
        close_gradients(
            model, mixed(by_sample(plain, part), reweighter.weights, [n for n, _ in plain.named_parameters()])
        )


class Fixed(nn.Module):
    """Places times a buffer, as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.head = nn.Parameter(torch.randn(6, 2)), nn.Linear(2, 3)
        self.register_buffer("fixed", torch.randn(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.cat([x, x[..., :1]], 2).mT + self.places * self.fixed).mean(1))


def test_a_model_that_has_moved_or_was_loaded(data) -> None:
    """Buffers, and perhaps parameters, are others then."""
    model, reference = Fixed(), Fixed()
    method = GradMimic(model, reference, TASK, layers="places")
    reweighter = Reweighter(model, method, "filter", keep=1.0)
    model.double()
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    plain, data = copy.deepcopy(model), (data[0].double(), data[1])
    losses_of(plain, data).mean().backward()
    reweighter.backward(losses_of(model, data))
    close_gradients(model, {name: p.grad for name, p in plain.named_parameters()})
    distance = (reference.places - model.places).norm()
    assert method.norm == pytest.approx(float(distance), rel=1e-6)


def test_copies_of_the_model_are_not_trained(data) -> None:
    model = Normed()
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"), layers="head")
    losses = losses_of(model, data)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        average(data[0])
    reweighter.backward(losses)
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for _ in range(3):
        losses_of(loaded, data).mean().backward()
    again = Reweighter(loaded, GraNd(loaded, TASK, layers="head"), layers="head")
    again.backward(losses_of(loaded, data))
    reweighter.backward(losses_of(model, data))
    assert reweighter.table().num_rows == 12


def test_a_forward_pass_that_fails_is_none(models, data) -> None:
    model, _ = models
    reweighter = Reweighter(model, GraNd(model, TASK))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="size"):
            model(torch.randn(6, 3, 5))
        assert not any(module._forward_hooks for module in model.children())
        reweighter.backward(losses_of(model, data))


def test_a_score_that_not_every_batch_has(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK))
    for given in (None, torch.rand(6), None):
        reweighter.backward(losses_of(model, data), ids=list("abcdef"), reference_losses=given)
    table = reweighter.table()
    assert table.column_names == ["id", "step", "mimic", "loss", "reference_loss", "rho", "weight"]
    known = np.isfinite(table["rho"].to_numpy())
    assert known.tolist() == [False] * 6 + [True] * 6 + [False] * 6
    reweighter.load_state_dict(reweighter.state_dict())
    with pytest.raises(ValueError, match="ids: none came in step 4"):
        reweighter.backward(losses_of(model, data))


# ---- what goes wrong is an error before the optimizer steps


def test_a_trainer_that_goes_its_own_way(models, data) -> None:
    model, reference = models
    Reweighter(model, GradMimic(model, reference, TASK))
    losses_of(model, data).mean().backward()
    with pytest.raises(RuntimeError, match=r"Reweighter\.backward never came"):
        losses_of(model, data)


def test_a_trainer_that_goes_its_own_way_from_the_start(models, data) -> None:
    model, reference = models
    Reweighter(model, GradMimic(model, reference, TASK), warmup_steps=100)
    losses_of(model, data).mean().backward()
    with pytest.raises(RuntimeError, match=r"Reweighter\.backward never came"):
        losses_of(model, data)


def test_two_on_one_model(models, data) -> None:
    model, _ = models
    method = GraNd(model, TASK)
    first = Reweighter(model, method)
    with pytest.raises(ValueError, match=r"the model has a Reweighter already; detach\(\)"):
        Reweighter(model, method)
    whole = nn.Sequential(model)
    method_of_whole = GraNd(whole, TASK)
    with pytest.raises(ValueError, match="its layer '0' has a Reweighter already"):
        Reweighter(whole, method_of_whole)
    first.detach()
    Reweighter(model, method).backward(losses_of(model, data))


def test_parameters_that_are_frozen_or_unfrozen_later(models, data) -> None:
    model, _ = models
    model.stem.requires_grad_(False)
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"), layers=["head", "norm"])
    reweighter.backward(losses_of(model, data))
    model.stem.requires_grad_(True)  # none of the reweighted
    reweighter.backward(losses_of(model, data))
    model.norm.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'norm\.weight' has been frozen"):
        losses_of(model, data)
    reweighter.detach()
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"))
    model.norm.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'norm\.weight' has been unfrozen"):
        reweighter.backward(losses_of(model, data))


def test_another_backward_pass_of_what_is_cut_off(data) -> None:
    model = Bare()
    reweighter = Reweighter(model, GraNd(model, TASK))
    losses = losses_of(model, data)
    losses.square().sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="something else was backpropagated"):
        reweighter.backward(losses)


def test_a_probe_beside_it(data) -> None:
    model = Bare()
    reduction = {"n": SqNorm(["token", "places", "head.weight"])}
    expected = Probe(model, TASK, reductions=reduction)(data).reduced["n"]
    reweighter = Reweighter(model, GraNd(model, TASK))
    for _ in range(2):
        torch.testing.assert_close(Probe(model, TASK, reductions=reduction)(data).reduced["n"], expected)
    reweighter.backward(losses_of(model, data))
    assert reweighter.weights is not None


def test_a_parameter_that_is_gone(models, data) -> None:
    model, _ = models
    Reweighter(model, GraNd(model, TASK, layers="head"), layers="head")
    model.head = nn.Linear(6, 3, bias=False)
    with pytest.raises(RuntimeError, match=r"'head\.bias' is the model's no more"):
        losses_of(model, data)


def test_ids(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK))
    with pytest.raises(ValueError, match="expected one per sample, 6, found 2"):
        reweighter.backward(losses_of(model, data), ids=["a", "b"])
    wrong = {"reference_losses": torch.ones(1), "logits": torch.ones(5, 3), "labels": torch.ones(())}
    for name, values in wrong.items():
        with pytest.raises(ValueError, match=f"{name}: expected one per sample"):
            reweighter.backward(losses_of(model, data), **{name: values})
    for ids in ("abcdef", torch.arange(6)[:, None], torch.arange(6.0), [b"a"] * 6, [None] * 6, torch.tensor(6)):
        with pytest.raises(ValueError, match=r"ids: .*; expected (a sequence|strings or integers), one per sample"):
            reweighter.backward(losses_of(model, data), ids=ids)
    with pytest.raises(ValueError, match="'a' is in the batch of step 1 more than once"):
        reweighter.backward(losses_of(model, data), ids=list("abcdea"))
    with pytest.raises(ValueError, match="ids: none came in step 1"):
        reweighter.backward(losses_of(model, data))


def parts(model: Any, x: Tensor) -> Tensor:
    """The model's own, without its __call__."""
    return model.head(model.norm(model.stem(x).mT).mean(1))


def coupled(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Every sample's loss grows with the others' logits."""
    logits = model(data[0])
    return F.cross_entropy(logits + logits.mean(0), data[1], reduction="none")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda model, data: losses_of(model, data).mean(), r"losses of shape \(\); expected one per sample"),
        (lambda model, data: losses_of(model, data)[:3], "3 losses came, and the model ran on a batch of 6"),
        (lambda model, data: losses_of(model, data).detach(), "have no graph"),
        (lambda model, data: losses_of(model, data) / torch.tensor([1, 1, 0, 1, 1, 1]), "loss of sample 2 .* inf"),
        (lambda model, data: losses_of(model, data) + losses_of(model, data), "ran forward 2 times"),
        (lambda model, data: parts(model, data[0]).sum(1), "did not run forward"),
    ],
)
def test_losses(models, data, losses, message) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK))
    reweighter.backward(losses_of(model, data))
    with pytest.raises(RuntimeError, match=message):
        reweighter.backward(losses(model, data))


def test_losses_that_depend_on_other_samples(models, data) -> None:
    model, reference = models
    with pytest.raises(RuntimeError, match="do not add up"):
        Reweighter(model, GradMimic(model, reference, TASK)).backward(coupled(model, data))


def halved(gradient: Tensor) -> Tensor:
    return gradient / 2


def halve_grad(parameter: Tensor) -> None:
    parameter.grad /= 2


@pytest.mark.parametrize(
    ("how", "hook"), [("register_hook", halved), ("register_post_accumulate_grad_hook", halve_grad)]
)
def test_a_hook_on_a_weight_sees_the_weighted_gradient(models, data, how, hook) -> None:
    """One that stands between autograd's gradient and the check fails it, and is named."""
    start, reference = models
    for verify in (True, False):
        model = copy.deepcopy(start)
        getattr(model.head.weight, how)(hook)
        reweighter = Reweighter(model, GradMimic(model, reference, TASK), verify=verify)
        if verify and hook is halved:
            with pytest.raises(RuntimeError, match=r"'head\.weight'.*a hook on it \(halved; Tensor\.register_hook\)"):
                reweighter.backward(losses_of(model, data))
            continue
        reweighter.backward(losses_of(model, data))
        expected = torch.einsum("b,bij->ij", reweighter.weights, by_sample(start, data)["head.weight"]) / 12
        torch.testing.assert_close(model.head.weight.grad, expected)


def penalised(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    return losses_of(model, data) + 1e-5 * model.head.weight.square().sum()


def replaced(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    model.head = nn.Linear(6, 3)
    return losses_of(model, data)


def of_another_pass(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    model(data[0])
    losses = losses_of(model.eval(), data)
    model.train()
    return losses


@pytest.mark.parametrize("losses", [penalised, replaced, of_another_pass])
@pytest.mark.parametrize(("first", "verify"), [(True, True), (False, True), (False, False)])
def test_gradients_that_come_behind_a_layers_back(models, data, losses, first, verify) -> None:
    """However small they are, and in whatever step they begin."""
    model, _ = models
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"), layers="head", verify=verify)
    model.train()
    if not first:
        reweighter.backward(losses_of(model, data))
    with pytest.raises(RuntimeError, match=r"parameter 'head\.(weight|bias)': the losses depend on it behind"):
        reweighter.backward(losses(model, data))


def test_a_weight_that_is_used_twice_under_autocast(models, data) -> None:
    """Its cast is one node of the graph for both uses."""
    model, _ = models
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"), layers="head")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = losses_of(model, data).float() + F.linear(torch.ones(6, 6), model.head.weight).sum(1).float()
    with pytest.raises(RuntimeError, match=r"parameter 'head\.weight': the losses depend on it behind"):
        reweighter.backward(losses)


def test_batch_norm_in_training_mode(models, data) -> None:
    model = Normed()
    with pytest.raises(RuntimeError, match="layer 'batch' is a batch norm in training mode"):
        Reweighter(model, GraNd(model, TASK, layers="stem"), layers="stem").backward(losses_of(model, data))
    model = Normed()
    reweighter = Reweighter(model, GraNd(model, TASK, layers="head"), layers="head")
    reweighter.backward(losses_of(model, data))  # behind it every sample is its own
    assert reweighter.weights is not None


def test_layers_that_never_run(models, data) -> None:
    model = Net()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="layer 'extra' did not run in the first step"):
        Reweighter(model, GraNd(model, TASK, layers="head")).backward(losses_of(model, data))


def test_scores_that_make_no_weights(models, data) -> None:
    model, reference = models
    reweighter = Reweighter(model, GradMimic(model, reference, TASK), by="rho")
    with pytest.raises(RuntimeError, match="score 'rho' is NaN for all of the batch in step 1"):
        reweighter.backward(losses_of(model, data))


def test_what_a_constructor_refuses(models, data) -> None:
    model, reference = models
    method = GradMimic(model, reference, TASK)
    for arguments, message in [
        ({"mode": "drop"}, "mode 'drop'; expected"),
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"mode": "filter"}, "keep=None with mode 'filter'"),
        ({"keep": 0.5}, "keep=0.5 with mode 'reweight'"),
        ({"mode": "filter", "keep": 1.5}, r"expected a share in \(0, 1\]"),
        ({"by": "mimics"}, "gives no score 'mimics'; it gives mimic, loss"),
        ({"layers": "tail"}, "'tail' matches no layer"),
    ]:
        with pytest.raises(ValueError, match=message):
            Reweighter(model, method, **arguments)
    with pytest.raises(ValueError, match="found 0 of its models to be it"):
        Reweighter(Net(), method)
    with pytest.raises(ValueError, match="compiled"):
        Reweighter(torch.compile(model), GraNd(model, TASK))
    small = Net()
    small.head = nn.Linear(6, 2)
    with pytest.raises(ValueError, match=r"expected parameter head\.weight of shape"):
        GradMimic(model, small, TASK)


def test_a_method_of_other_losses_or_that_was_not_fitted(models, data) -> None:
    model, _ = models
    with pytest.raises(ValueError, match="trak is made of the gradients of Margin, and a trainer has those of its own"):
        Reweighter(model, TRAK([model], TASK, {"t": [data]}))
    reweighter = Reweighter(model, LESS([model], TASK, {"t": [data]}, optimizers=None))
    with pytest.raises(RuntimeError, match=r"call fit\(\)"):
        reweighter.backward(losses_of(model, data))
