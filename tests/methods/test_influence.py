"""TRAK, DsDm, LESS, LoGra, TrackStar and EK-FAC against their formulas with gradients multiplied out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import assay
from assay.methods import EKFAC, LESS, TRAK, AdamState, DsDm, Kernel, LoGra, Scorer, TrackStar
from assay.methods.influence import Influence
from assay.probe import Probe
from assay.tasks import CausalLM, Classification, Margin
from tests.methods.contract import texts
from tests.methods.small_problem import EXACT, POOL, gradients, probabilities, run


def test_trak_is_its_formula_where_nothing_is_projected(problem) -> None:
    models, pool, target = problem
    method = TRAK(models, Classification(), {"t": [target]}, sketch=EXACT, damping=0.05)
    method.together = False  # end to end: exact, for every layer is smaller than the sketch
    got = run(method, pool)["trak"]
    kernel, doubt = torch.zeros(POOL).double(), torch.zeros(POOL).double()
    for model in models:
        phi, query = gradients(model, *pool, margin=True), gradients(model, *target, margin=True).mean(0)
        moment = phi.T @ phi / POOL
        moment += 0.05 * moment.diagonal().mean() * torch.eye(len(moment))
        kernel += phi @ torch.linalg.solve(moment, query) / 2
        doubt += (1 - probabilities(model, *pool)) / 2
    torch.testing.assert_close(got, kernel * doubt, rtol=1e-3, atol=1e-4 * float(kernel.abs().max()))


def test_several_targets_are_columns_and_their_mean(problem) -> None:
    models, pool, target = problem
    halves = {"a": [(target[0][:2], target[1][:2])], "b": [(target[0][2:4], target[1][2:4])]}
    scores = run(DsDm(models, Classification(), halves, name="dsdm"), pool)
    assert list(scores) == ["dsdm", "dsdm_a", "dsdm_b"]
    torch.testing.assert_close(scores["dsdm"], (scores["dsdm_a"] + scores["dsdm_b"]) / 2)
    one = run(DsDm(models, Classification(), {"x": [(target[0][:4], target[1][:4])]}, name="dsdm"), pool)
    scale = float(scores["dsdm"].abs().max())
    torch.testing.assert_close(one["dsdm"], scores["dsdm"], rtol=1e-3, atol=1e-4 * scale)  # averaged before or after


def test_scores_do_not_depend_on_batching(problem) -> None:
    models, pool, target = problem
    whole = run(TRAK(models, Classification(), {"t": [target]}), pool)["trak"]
    method = TRAK(models, Classification(), {"t": [(target[0][:1], target[1][:1]), (target[0][1:], target[1][1:])]})
    pieces = [(pool[0][i : i + 7], pool[1][i : i + 7]) for i in range(0, POOL, 7)]
    method.fit(pieces)
    table = assay.score(pieces, [method])
    torch.testing.assert_close(torch.tensor(table["trak"].to_pylist()).double(), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["ekfac", "logra", "trackstar"])
def test_gradients_that_are_0_but_for_rounding_stay_so(kind: str) -> None:
    """The key biases of attention: their noise in float32 is not that in float64, and must not be seen."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    ids, y = torch.randint(50, (20, 8)), torch.randint(3, (20,))
    pool = [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, y)]
    target = {"t": [({"input_ids": ids[:4], "attention_mask": torch.ones_like(ids[:4])}, y[:4])]}

    def scores() -> Tensor:
        method: Influence | EKFAC
        if kind == "ekfac":
            method = EKFAC(model, Classification(), target, true_fisher=False)
        else:
            form = LoGra if kind == "logra" else TrackStar
            method = form([model], Classification(), target, sketch=assay.Kronecker(8, 8))
        return torch.tensor(assay.score(pool, [method.fit(pool)])[kind].to_pylist())

    single = scores()
    model.double()
    double = scores()
    torch.testing.assert_close(single, double, rtol=0, atol=2e-5 * float(double.abs().max()))


def test_a_sample_with_nothing_to_predict_has_no_score() -> None:
    """0 would rank it above every harmful sample."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, ids = transformers.GPT2LMHeadModel(config).eval(), torch.randint(40, (6, 10))
    pool = {"input_ids": ids, "labels": ids.clone()}
    pool["labels"][2] = -100
    target = {"t": [{"input_ids": ids[:2]}]}
    ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    methods = [
        TRAK([model], CausalLM(), target),
        LESS([model], CausalLM(), target, optimizers=[AdamState(ones, ones)]),
        LoGra([model], CausalLM(), target),
        TrackStar([model], CausalLM(), target),
        EKFAC(model, CausalLM(), target, self_influence=True),
    ]
    for method in methods:
        table = assay.score([pool], [method.fit([pool])])
        for column in method.columns:
            scores = torch.tensor([float("nan") if v is None else v for v in table[column.name].to_pylist()])
            assert scores.isnan().tolist() == [False, False, True, False, False, False], column.name


@pytest.mark.parametrize("make", [*(pytest.param(m, marks=pytest.mark.slow) for m in (TRAK, DsDm, LoGra)), TrackStar])
def test_target_samples_without_a_finite_gradient_are_left_out(problem, make) -> None:
    models, pool, (x, y) = problem
    broken = x.clone()
    broken[1] = torch.inf
    kept = [0, 2, 3, 4]
    got, want = (
        run(make(models, Classification(), {"t": [t]}, sketch=EXACT), pool) for t in ((broken, y), (x[kept], y[kept]))
    )
    for name, score in got.items():
        torch.testing.assert_close(score, want[name], rtol=1e-3, atol=1e-4 * float(score.abs().max()))
    with pytest.raises(ValueError, match="none of target 't''s 1 samples has a finite gradient"):
        make(models, Classification(), {"t": [(broken[1:2], y[1:2])]}).fit([pool])


def test_language_models() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(40, (12, 10))
    batch, target = {"input_ids": ids}, {"input_ids": ids[:2]}
    for make in (TRAK, DsDm, LoGra):
        fused = make([model], CausalLM(), {"t": [target]}).fit([batch])
        plain = make([model], CausalLM(fused=False), {"t": [target]}).fit([batch])
        a, b = (torch.tensor(assay.score([batch], [m])[m.name].to_pylist()) for m in (fused, plain))
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3 * float(b.abs().max()))


def test_errors(problem) -> None:
    models, pool, target = problem
    with pytest.raises(ValueError, match="target 'empty' has no samples"):
        TRAK(models, Classification(), {"empty": []}).fit([pool])
    with pytest.raises(ValueError, match="needs samples of the pool"):
        TRAK(models, Classification(), {"t": [target]}).fit([])
    with pytest.raises(RuntimeError, match="call fit"):
        TRAK(models, Classification(), {"t": [target]}).score({})
    with pytest.raises(ValueError, match=r"checkpoint 1 differs from checkpoint 0 in parameter '0\.weight'"):
        TRAK([models[0], nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))], Classification(), {"t": []})
    with pytest.raises(ValueError, match=r"no exp_avg for parameter '0\.weight'"):
        LESS([models[0]], Classification(), {"t": []}, optimizers=[AdamState({}, {})])
    with pytest.raises(ValueError, match="one optimiser state per checkpoint, 2, got 1"):
        LESS(models, Classification(), {"t": []}, optimizers=[AdamState({}, {})])
    with pytest.raises(ValueError, match="expected at least one target"):
        TRAK(models, Classification(), {})
    with pytest.raises(ValueError, match=r"singular with damping 0\.0"):
        TRAK(models, Classification(), {"t": [target]}, damping=0.0, sketch=assay.Kronecker(16, 16)).fit([pool])


def test_numbers_out_of_range_are_named_before_any_work(problem) -> None:
    models, _, target = problem
    given = (models, Classification(), {"t": [target]})
    for make in (TRAK, DsDm, LoGra, TrackStar):
        for wrong in (-0.1, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"damping: expected a finite number of at least 0, got {wrong}"):
                make(*given, damping=wrong)
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"target_share: expected a number from 0 to 1, got {share}"):
            TrackStar(*given, target_share=share)
    with pytest.raises(ValueError, match="eps 'in'; expected 'outside' or 'inside'"):
        LESS(*given, optimizers=None, eps="in")
    with pytest.raises(ValueError, match="across 'sum'; expected 'mean' or 'max'"):
        Kernel(across="sum")
    with pytest.raises(ValueError, match="weights: expected one weight per model"):
        LESS(*given, optimizers=None, weights=[1.0])
    huge = assay.Rademacher(10**6)
    with pytest.raises(ValueError, match=r"trak: Rademacher.* 1,000,000 numbers, whose second moments take 14,901 GiB"):
        TRAK(*given, sketch=huge)
    LESS(*given, optimizers=None, sketch=huge)  # has no second moment


def test_scores_of_features_are_those_of_the_models(problem) -> None:
    models, pool, target = problem
    method = TRAK(models, Classification(), {"a": [target], "b": [(target[0][:2], target[1][:2])]}).fit([pool])
    signals = Scorer([method])
    table = signals(pool)
    probes = [Probe(need.model, need.task, reductions=need.reductions) for need in method.needs().values()]
    features, doubts = method.raw_features({f"model{k}": probe(pool) for k, probe in enumerate(probes)})
    assert [tuple(f.shape) for f in features] == [(POOL, 256)] * 2
    scores = method.score_features(features, doubts)
    assert list(scores) == list(table) == ["trak", "trak_a", "trak_b"]
    for name, values in table.items():
        torch.testing.assert_close(scores[name], values)
    rounded = method.score_features([f.half() for f in features], doubts)["trak"]  # computed with in float32
    assert rounded.dtype == torch.float32
    widened = method.score_features([f.half().float() for f in features], doubts)["trak"]
    assert torch.equal(rounded, widened)
    assert method.score_features([f[:0] for f in features], [d[:0] for d in doubts or ()])["trak"].shape == (0,)


def test_score_features_says_what_it_wants(problem) -> None:
    models, _, target = problem
    method = LESS(models, Classification(), {"t": [target]}, optimizers=None, name="m")
    features = [torch.zeros(3, 4096)] * 2
    with pytest.raises(RuntimeError, match=r"m: call fit\(\) before scoring"):
        method.score_features(features)
    method.fit()
    for wrong in (features[:1], [features[0], torch.zeros(3, 5)], [features[0], torch.zeros(2, 4096)], []):
        with pytest.raises(ValueError, match=r"m: expected features \(B, 4096\) of 2 checkpoints, got "):
            method.score_features(wrong)
    with pytest.raises(ValueError, match=r"m: expected doubts none, got \(3,\), \(3,\)"):
        method.score_features(features, [torch.zeros(3)] * 2)
    doubting = TRAK(models, Classification(), {"t": [target]}, name="m").fit([target])
    with pytest.raises(ValueError, match=r"m: expected doubts \[\(3,\), \(3,\)\], got none"):
        doubting.score_features([torch.zeros(3, 256)] * 2)


def test_a_margin_of_nothing_is_nan_and_no_part_of_a_targets_mean() -> None:
    world = texts()
    broken = world.collate([world.broken, world.samples[0]])
    assert Margin(CausalLM()).forward(world.models[0], broken).losses.isnan().tolist() == [True, False]
    scores = []
    for silent in (0, 5):
        target = world.collate([*world.samples[:4], *[world.broken] * silent])
        method = Influence(world.models[:1], Margin(CausalLM()), {"t": [target]}, Kernel(), EXACT)
        scores.append(Scorer([method.fit()])(world.pool[0])["influence"])
    torch.testing.assert_close(*scores)
