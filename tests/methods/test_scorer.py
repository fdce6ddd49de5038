"""The scorer runs every model once per batch, and assay.score makes tables."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import assay
from assay.methods import (
    EKFAC,
    TRAK,
    Column,
    Ensemble,
    GradMimic,
    GraNd,
    InfluenceDistillation,
    LoGra,
    Method,
    Need,
    Scorer,
    Views,
    ensemble_scores,
)
from assay.methods.base import samples_gathered
from assay.methods.scorer import _wait_for
from assay.probe import Probe, SqNorm, tapped_parameters
from assay.tasks import CausalLM, Classification, Margin, Regression, Sampled
from tests.methods.data import mlp, noisy_digits, train


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        out: torch.Tensor = self.inner(x)
        return out


def test_each_model_runs_once_per_batch() -> None:
    data = noisy_digits(0.3, size=200)
    start = mlp(0)
    model = Counting(start)
    reference = Counting(train(start, data.x, data.true, 3))
    task = Classification()
    methods: list[Method] = [
        GradMimic(model, reference, task),
        GradMimic(model, reference, task, "inner.2", name="head"),
        Ensemble([model, reference], task),
    ]
    batches = list(zip(data.x.split(50), data.given.split(50), strict=True))
    table = assay.score(batches, methods, verify=False)
    assert (model.calls, reference.calls) == (4, 4)
    assert table.num_rows == 200
    assert {"mimic", "head", "head_loss", "ensemble_nll"} <= set(table.column_names)
    alone = assay.score(batches, [GradMimic(model, reference, task, "inner.2", name="head")], verify=False)
    np.testing.assert_allclose(table["head"].to_numpy(), alone["head"].to_numpy(), rtol=1e-5, atol=1e-7)
    want = ensemble_scores([model(data.x), reference(data.x)], data.given)
    np.testing.assert_allclose(table["ensemble_nll"].to_numpy(), want["nll"].numpy(), rtol=1e-4, atol=1e-5)


def test_table_ids_directions_and_metadata() -> None:
    data = noisy_digits(0.3, size=60)
    method = Ensemble([mlp(0), mlp(1)], Classification(), weights=[1, 3])
    table = assay.score([(data.x, data.given)], [method], ids=[f"d{i}" for i in range(60)])
    assert table["id"][3].as_py() == "d3"
    assert table.schema.field("ensemble_margin").metadata[b"keep"] == b"high"
    assert table.schema.field("ensemble_nll").metadata[b"keep"] == b"low"
    assert table.schema.field("ensemble_mutual_information").metadata[b"keep"] == b"none"
    assert json.loads(table.schema.metadata[b"assay"])["methods"]["ensemble.models"] == "2"
    assert isinstance(method, Method)
    with pytest.raises(ValueError, match="ids: expected one per sample, 60, got 2"):
        assay.score([(data.x, data.given)], [method], ids=["a", "b"])
    for ids in (torch.arange(60), np.arange(60), range(60)):
        table = assay.score([(data.x, data.given)], [method], ids=ids)
        assert table["id"].to_pylist() == [str(i) for i in range(60)]
    assert assay.score([], [method]).num_rows == 0


def test_what_is_beyond_float32_is_no_score() -> None:
    """Targets of 1e30 and −3.4e38 stand for missing ones in many files: by GraNd they would be the best of all."""
    torch.manual_seed(0)
    model, task = nn.Linear(3, 1), Regression()
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    methods: list[Method] = [Ensemble([model], task), GraNd(model, task)]
    expected = assay.score([(x, y)], methods)
    y[2], y[4] = 1e30, -3.4e38
    found = assay.score([(x, y)], methods)
    for name in ("loss", "grand", "ensemble_residual"):
        values = found[name].to_numpy()
        np.testing.assert_array_equal(np.isnan(values), [i in (2, 4) for i in range(6)], err_msg=name)
        np.testing.assert_allclose(values[[0, 1, 3, 5]], expected[name].to_numpy()[[0, 1, 3, 5]], rtol=1e-5)
    assert np.isfinite(found["ensemble_mean"].to_numpy()).all()
    assert assay.select.top(found, "grand", 4).mask.tolist() == [i not in (2, 4) for i in range(6)]


def test_name_clash_is_an_error() -> None:
    model = mlp(0)
    with pytest.raises(ValueError, match=r"ensemble_nll.*another name="):
        Scorer([Ensemble([model], Classification()), Ensemble([model], Classification())])


class TinyLM(nn.Module):
    def __init__(self, vocabulary: int = 23) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 8)
        self.head = nn.Linear(8, vocabulary)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.embed(input_ids).cumsum(1))
        return out


def test_text_gets_the_mean_over_predicted_tokens() -> None:
    torch.manual_seed(0)
    models = [TinyLM(), TinyLM()]
    ids = torch.randint(23, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    mask[2, 1:] = 0  # one token: nothing to predict
    table = assay.score([{"input_ids": ids, "attention_mask": mask}], [Ensemble(models, CausalLM())])
    for row, length in ((0, 7), (1, 4)):
        logits = torch.stack([m(ids[row : row + 1, :length])[0, :-1] for m in models])
        want = assay.ops.ensemble_stats(logits, ids[row, 1:length])
        assert table["ensemble_nll"][row].as_py() == pytest.approx(float(want.nll.mean()), rel=1e-5)
        assert table["ensemble_entropy"][row].as_py() == pytest.approx(float(want.entropy.mean()), rel=1e-5)
    assert np.isnan(table["ensemble_nll"][2].as_py())
    assert "ensemble_prediction" not in table.column_names


class Length(Method):
    """Needs no model."""

    name = "length"
    columns = (Column("characters", "high", "of the text"), Column("start", "none", "two letters' codes", width=2))

    def needs(self):
        return {"text": Need(raw=["text"])}

    def score(self, signals):
        texts = signals["text"].raw["text"]
        start = torch.tensor([[ord(c) for c in text[:2]] for text in texts]).reshape(-1, 2)
        return {"characters": torch.tensor([len(text) for text in texts]), "start": start}


class Gain(Method):
    """What a prompt takes off the loss: one model, two views of a sample."""

    name = "gain"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.columns = [Column("gain", "high", "loss without − loss with")]

    def needs(self):
        return {
            "plain": Need(self.model, CausalLM()),
            "prompted": Need(self.model, CausalLM(), view="prompted", raw=("text",)),
        }

    def score(self, signals):
        assert signals["prompted"].raw["text"]
        assert not signals["plain"].raw
        return {"gain": signals["plain"].losses - signals["prompted"].losses}


class PerToken(Method):
    """A number per token: its loss."""

    name = "per_token"
    columns = (Column("token_loss", "low", "of each token", width=None),)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def needs(self):
        return {"model": Need(self.model, CausalLM())}

    def score(self, signals):
        losses, labels = signals["model"].row_losses, signals["model"].labels
        return {"token_loss": losses.masked_fill(labels.view(losses.shape) < 0, torch.nan)}


def test_raw_columns_views_and_widths_beside_one_another() -> None:
    torch.manual_seed(0)
    model, ids = TinyLM(), torch.randint(23, (4, 6))
    prompted = torch.cat([torch.zeros(4, 2, dtype=torch.long), ids], 1)
    texts = ["ab", "cde", "fghi", "jk"]

    def views(rows: slice) -> Views:
        return Views(
            {"input_ids": ids[rows]}, {"prompted": {"input_ids": prompted[rows]}}, {"text": texts[rows], "other": [1]}
        )

    methods = [Length(), Gain(model), PerToken(model), Ensemble([model], CausalLM())]
    table = assay.score([views(slice(0, 3)), views(slice(3, 4))], methods)
    assert table["characters"].to_pylist() == [2, 3, 4, 2]
    assert table["start"].to_pylist()[1] == [99, 100]
    assert table.schema.field("start").type.list_size == 2
    task = CausalLM()
    plain, other = (task.forward(model, {"input_ids": x}).losses for x in (ids, prompted))
    np.testing.assert_allclose(table["gain"].to_numpy(), (plain - other).detach(), rtol=1e-4, atol=1e-6)
    assert [len(row) for row in table["token_loss"].to_pylist()] == [5] * 4
    assert np.mean(table["token_loss"].to_pylist()[2]) == pytest.approx(plain[2].item(), rel=1e-5)
    np.testing.assert_allclose(table["ensemble_mean_nll"].to_numpy(), plain.detach(), rtol=1e-5)
    assert assay.score([], methods).num_rows == 0


def test_tokens_do_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    model, ids = TinyLM(), torch.randint(23, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    alone = {"input_ids": ids[1:2, :5]}
    method = [PerToken(model)]
    padded = assay.score([{"input_ids": ids, "attention_mask": mask}], method)["token_loss"].to_pylist()
    assert [len(row) for row in padded] == [8, 4, 8]
    np.testing.assert_allclose(padded[1], assay.score([alone], method)["token_loss"].to_pylist()[0], rtol=1e-5)
    mixed = assay.score([alone, {"input_ids": ids}], method)["token_loss"].to_pylist()
    assert [len(row) for row in mixed] == [4, 8, 8, 8]


def test_embeddings_of_two_layers_beside_a_method_without() -> None:
    class Embedding(Method):
        def __init__(self, model: nn.Module, layer: str) -> None:
            self.model, self.name = model, layer
            self.columns = [Column(f"mean_{layer}", "none", "of the pooled input")]

        def needs(self):
            return {"model": Need(self.model, Classification(), embeddings=self.name)}

        def score(self, signals):
            return {f"mean_{self.name}": signals["model"].embeddings.mean(1)}

    data, model = noisy_digits(0.3, size=20), Counting(mlp(0))
    methods = [Ensemble([model], Classification()), Embedding(model, "inner.2"), Embedding(model, "inner.0")]
    table = assay.score([(data.x, data.given)], methods, verify=False)
    assert model.calls == 2  # one more for the second layer
    np.testing.assert_allclose(table["mean_inner.0"].to_numpy(), data.x.mean(1), rtol=1e-4, atol=1e-6)
    hidden = model.inner[1](model.inner[0](data.x)).mean(1).detach()
    np.testing.assert_allclose(table["mean_inner.2"].to_numpy(), hidden, rtol=1e-4, atol=1e-6)


def test_parts_that_a_batch_lacks_are_named() -> None:
    model, batch = TinyLM(), {"input_ids": torch.zeros(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"no raw column 'text'; expected methods\.Views\(main, raw="):
        Scorer([Length()])(batch)
    with pytest.raises(ValueError, match=r"no view 'prompted'; expected methods\.Views\(main, others="):
        Scorer([Gain(model)])(Views(batch, raw={"text": ["a", "b"]}))
    with pytest.raises(ValueError, match="the main view has 2, raw column 'text' has 1"):
        Scorer([Length(), Ensemble([model], CausalLM())])(Views(batch, raw={"text": ["ab"]}))


def test_scores_that_a_method_did_not_promise_are_named() -> None:
    class Wrong(Length):
        columns = (Column("characters", "high", "of the text", width=3), Column("start", "none", "", width=2))

    batch = Views(None, raw={"text": ["ab", "cd"]})
    with pytest.raises(ValueError, match=r"characters: scores of shape \(2,\); expected \(2, 3\)"):
        Scorer([Wrong()])(batch)
    Wrong.columns = (*Length.columns, Column("more", "none", ""))
    with pytest.raises(ValueError, match="length: gave no score 'more', only 'characters', 'start'"):
        Scorer([Wrong()])(batch)


def test_needs_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="run with a task"):
        Need(nn.Identity())
    with pytest.raises(ValueError, match="are a model's"):
        Need(raw=["text"], logits=True)
    with pytest.raises(ValueError, match="asks for nothing"):
        Need()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_tasks_that_read_the_same_forward_pass_share_it(order: int, verify: bool) -> None:
    """TRAK takes the margin's gradient, LoGra and GradMimic the loss', the ensemble neither: one pass serves all."""
    data, task = noisy_digits(0.3, size=90), Classification()
    model, reference = Counting(mlp(0)), Counting(train(mlp(0), data.x, data.true, 2))
    batches = list(zip(data.x.split(30), data.given.split(30), strict=True))
    targets = {"t": batches[:1]}
    methods: list[Method] = [
        TRAK([model], task, targets).fit(batches),
        LoGra([model], task, targets).fit(batches),
        GradMimic(model, reference, task, cosine=True),
        Ensemble([model, reference], task),
    ][::order]
    scorer = Scorer(methods, verify=verify)
    model.calls = reference.calls = 0
    together = [scorer(batch) for batch in batches]
    assert (model.calls, reference.calls) == (
        3 + 2 * verify,
        3,
    )  # and one for each check: two
    for method in methods:
        alone = Scorer([method], verify=False)
        for batch, found in zip(batches, together, strict=True):
            for name, value in alone(batch).items():
                assert torch.equal(value, found[name]), name


def test_a_margin_of_a_language_model_shares_its_pass_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    calls: list[int] = []
    model.register_forward_hook(lambda *rest: calls.append(1))
    names = tapped_parameters(model)
    norms = {n: SqNorm([n]) for n in names}
    batch = {"input_ids": torch.randint(31, (3, 7))}
    task = CausalLM()
    probe = Probe(model, task, reductions=norms, readings=[(Margin(task), norms)], verify=False)
    loss, margin = probe.read(batch)
    assert len(calls) == 1
    for found, alone in (
        (loss, Probe(model, task, reductions=norms)),
        (margin, Probe(model, Margin(task), reductions=norms)),
    ):
        expected = alone(batch)
        assert torch.equal(found.losses, expected.losses)
        assert all(torch.equal(found.reduced[n], expected.reduced[n]) for n in names)
    with pytest.raises(ValueError, match="must be of the forward pass"):
        Probe(model, task, reductions=norms, readings=[(Sampled(task), norms)])


def test_a_batch_without_samples_gives_no_rows() -> None:
    data, task = noisy_digits(0.3, size=40), Classification()
    model, batch = mlp(0), (data.x, data.given)
    methods: list[Method] = [
        GradMimic(model, mlp(1), task),
        EKFAC(model, task, {"t": [batch]}, self_influence=True).fit([(data.x[:0], data.given[:0]), batch]),
        Ensemble([model], task),
    ]
    empty = Scorer(methods)((data.x[:0], data.given[:0]))
    assert all(value.shape == (0,) for value in empty.values())
    whole = assay.score([batch], methods)
    parts = [(data.x[:0], data.given[:0]), (data.x[:25], data.given[:25]), (data.x[25:], data.given[25:])]
    table = assay.score(parts, methods)
    assert table.num_rows == 40
    np.testing.assert_allclose(table["ekfac"].to_numpy(), whole["ekfac"].to_numpy(), rtol=1e-3, atol=1e-6)
    signals = Probe(model, task, factors="*")((data.x[:0], data.given[:0]))
    assert signals.losses.shape == (0,)


class Rolled(nn.Module):
    """Runs a layer on the samples in another order, which no shape shows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x.roll(1, 0)).roll(-1, 0).tanh().sum(1))


def test_fit_checks_the_gradients_that_it_takes() -> None:
    model, task = Rolled(), Classification()
    batch = torch.randn(5, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    targets = {"t": [batch]}
    for method in (
        EKFAC(model, task, targets),
        EKFAC(model, task, targets, true_fisher=False),
        LoGra([model], task, targets),
        TRAK([model], task, targets),
        InfluenceDistillation(model, task, targets, landmarks=3),
    ):
        with pytest.raises(RuntimeError, match=r"parameter 'layer\.\w+'"):
            method.fit([batch])


class OddCell(nn.RNNCell):
    """A subclass may take other steps than torch's cell."""


class PartlySupported(nn.Module):
    """A layer that is refused by its class, and a parameter whose use cannot be followed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.known, self.odd, self.head = nn.Linear(4, 6), OddCell(6, 6), nn.Linear(6, 3)
        self.mix = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.odd(self.known(x).tanh()).tanh()
        return self.head(torch.einsum("bi,io->bo", h, self.mix))


def test_what_was_left_out_is_in_the_metadata() -> None:
    model, reference, task = PartlySupported(), PartlySupported(), Classification()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1)
    batch = torch.randn(8, 4), torch.randint(3, (8,))
    methods: list[Method] = [
        GradMimic(model, reference, task, skip_unsupported=True, name="all"),
        GradMimic(model, reference, task, "head", name="head"),
        EKFAC(model, task, {"t": [batch]}, skip_unsupported=True).fit([batch]),
        LoGra([model], task, {"t": [batch]}, skip_unsupported=True, layers=["*", "!known"]).fit([batch]),
    ]
    scorer = Scorer(methods)
    before = scorer.metadata()
    assert before["all.left_out_layers"] == "odd"  # known before a batch is run
    scorer(batch)
    facts = scorer.metadata()
    total = sum(p.numel() for p in model.parameters())
    seen = total - model.mix.numel() - sum(p.numel() for p in model.odd.parameters())
    for name, share in (("all", seen), ("ekfac", seen), ("logra", seen - 30)):
        assert facts[f"{name}.left_out_layers"] == "mix, odd"
        assert float(facts[f"{name}.coverage"]) == pytest.approx(share / total, abs=1e-4)
    assert "head.coverage" not in facts
    with pytest.raises(RuntimeError, match=r"parameter 'mix'.*einsum"):  # wanted by one that leaves nothing out
        Scorer([*methods, GradMimic(model, reference, task, "mix", name="mix")])(batch)


def test_a_view_without_samples_is_no_empty_batch() -> None:
    model, ids = TinyLM(), torch.randint(23, (3, 6))
    with pytest.raises(ValueError, match="the main view has 3, view 'prompted' has 0"):
        Scorer([Gain(model)])(Views({"input_ids": ids}, {"prompted": {"input_ids": ids[:0]}}, {"text": ["a"] * 3}))


def test_what_metadata_speaks_of_is_what_its_own_class_says() -> None:
    class Plain(Method):
        name = "plain"

    class Says(Plain):
        def metadata(self) -> dict[str, str]:
            return {"rows": "all"}

    class Fixed(Says):
        gathers = 0

        def metadata(self) -> dict[str, str]:
            return {}

    class Adds(Fixed):
        def metadata(self) -> dict[str, str]:
            return {"rows": "all"}

    class Renamed(Fixed):
        name = "renamed"

    assert [samples_gathered(made()) for made in (Plain, Says, Fixed, Adds, Renamed)] == [0, None, 0, None, 0]


def test_only_gpus_that_hold_a_model_are_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    model = mlp(0)
    Scorer([Ensemble([model], Classification())])((torch.randn(3, 64), torch.arange(3)))
    assert waited == []
    places = [torch.device("cuda", 1), torch.device("cpu"), torch.device("cuda", 1)]
    spread = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=place) for place in places])
    _wait_for([model, spread])
    assert waited == [torch.device("cuda", 1)]


def test_a_task_without_a_hash_is_named() -> None:
    class Own(Classification):
        __hash__ = None  # type: ignore[assignment]  # as of every data class that is not frozen

    with pytest.raises(TypeError, match=r"Own has no hash.*@dataclass\(frozen=True\)"):
        assay.score([(torch.randn(2, 3), torch.tensor([0, 1]))], [GraNd(nn.Linear(3, 2), Own())])
