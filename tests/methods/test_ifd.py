"""IFD: two views of the same tokens, against transformers' own losses of each sample alone, in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import assay
from assay.curate import RuleOptions, curate
from assay.methods import IFD, Ensemble
from assay.tasks import CausalLM, Classification, Response
from tests.small_models import llama_config
from tests.small_scores import make_scores

BOS = 256
# (prompt, response); what has no score last.
PAIRS: list[tuple[list[int], list[int]]] = [
    ([5, 6, 7], [8, 9, 10, 11]),
    ([12], [13, 14]),
    ([9, 9, 9, 9, 9, 9, 9], [20, 21, 22, 23, 24, 25]),
    ([30, 31], [32]),
    ([], [40, 41, 42]),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(llama_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def collate(rows: list[tuple[list[int], list[int]]], tail: int = 0) -> dict[str, Tensor]:
    """``tail``: so many tokens that do not count behind each response."""
    width = max(len(p) + len(r) + tail for p, r in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for i, (prompt, response) in enumerate(rows):
        whole = torch.tensor([*prompt, *response, *[3] * tail])
        ids[i, : len(whole)], mask[i, : len(whole)] = whole, 1
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def losses(model: Any, ids: list[int], counted: int) -> list[float]:
    """Of the last ``counted`` tokens of one text, in float64, from all of its logits."""
    with torch.no_grad():
        log_p = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0].log_softmax(1)
    return [-float(log_p[t - 1, ids[t]]) for t in range(len(ids) - counted, len(ids))]


def by_hand(model: Any, prompt: list[int], response: list[int]) -> tuple[float, float, float]:
    if prompt[:1] == [BOS]:
        given, alone = (losses(model, [*before, *response], len(response)) for before in (prompt, [BOS]))
    else:  # nothing predicts the first token of the response alone
        given = losses(model, [*prompt, *response], len(response) - 1)
        alone = losses(model, response, len(response) - 1)
    if not given or not prompt:
        return math.nan, math.nan, math.nan
    one, other = sum(given) / len(given), sum(alone) / len(alone)
    return math.exp(one) / math.exp(other), one, other


@pytest.mark.parametrize("begin", [False, True], ids=["bare", "bos"])
def test_the_ratio_is_transformers_own_in_any_batch(model, begin) -> None:
    rows = [([BOS, *prompt] if begin else prompt, response) for prompt, response in PAIRS]
    expected = torch.tensor([by_hand(model, *row) for row in rows])
    known = ~expected[:, 0].isnan()
    assert known.tolist() == ([True] * 5 if begin else [True] * 3 + [False] * 2)
    for size in (len(rows), 1, 2):
        batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        table = assay.score(batches, [IFD(model, CausalLM())])
        assert table.column_names[2:] == ["ifd", "ifd_given", "ifd_alone"]
        got = torch.tensor([table[name].to_pylist() for name in table.column_names[2:]]).T
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    if begin:  # a prompt that says nothing
        assert got[4, 0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (256, "256"),
        ([256], "256"),
        (None, "the config has no bos_token_id"),
        ([1, 2], "bos_token_id is [1, 2], which is no token"),
        (True, "bos_token_id is True, which is no token"),
        (-1, "bos_token_id is -1, and the model has 257 tokens"),
        (10**6, "bos_token_id is 1000000, and the model has 257 tokens"),
    ],
)
def test_what_begins_a_text_is_a_token_of_the_model(model, named, said) -> None:
    """Where the config names none, a text that begins with 1, say, is taken as it is; and the metadata says so."""
    own = copy.deepcopy(model)
    object.__setattr__(own.config, "bos_token_id", named)
    assert IFD(own, CausalLM()).metadata()["begin"] == said
    rows = [([BOS if said == "256" else 1, *prompt], response) for prompt, response in PAIRS]
    expected = torch.tensor([by_hand(model, *row) for row in rows])[:, 0]
    got = torch.tensor(assay.score([collate(rows)], [IFD(own, CausalLM())])["ifd"].to_pylist())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_what_does_not_count_behind_a_response_changes_nothing(model) -> None:
    plain, longer = (assay.score([collate(PAIRS, tail)], [IFD(model, CausalLM())]) for tail in (0, 2))
    for name in plain.column_names[2:]:
        assert longer[name].to_pylist() == pytest.approx(plain[name].to_pylist(), rel=1e-5, nan_ok=True)


def test_the_views_hold_the_same_tokens() -> None:
    batch = collate([([BOS, 5, 6], [7, 8]), ([5], [7, 8, 9])]) | {"position_ids": torch.zeros(2, 5), "kept": "as it is"}
    alone = Response(begin=BOS).alone(batch)
    assert alone["input_ids"].tolist() == [[BOS, 7, 8], [7, 8, 9]]
    assert alone["labels"].tolist() == [[-100, 7, 8], [7, 8, 9]]
    assert alone["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert "position_ids" not in alone  # the model counts them from the response's beginning
    assert alone["kept"] == "as it is"
    assert Response().alone(batch)["input_ids"][0, :2].tolist() == [7, 8]
    # ChatML's token begins turns, not texts.
    turns = Response(begin=BOS).alone(collate([([BOS, 5, BOS, 6], [7, 8, BOS]), ([BOS, 5, 5, 6], [7, 8, BOS])]))
    assert turns["input_ids"].tolist() == [[7, 8, BOS, BOS], [BOS, 7, 8, BOS]]
    assert turns["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_padding_on_the_left_is_no_prompt(model) -> None:
    right = collate(PAIRS[:1] * 2)
    left = {name: torch.nn.functional.pad(value, (2, 0)) for name, value in right.items()}
    left["labels"][:, :2] = -100
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    alone = Response().alone(left)
    assert torch.equal(alone["input_ids"], Response().alone(right)["input_ids"])
    one, other = (assay.score([batch], [IFD(model, CausalLM())])["ifd"].to_pylist() for batch in (right, left))
    assert other == pytest.approx(one, rel=1e-4)


def test_several_responses_or_none_have_no_score(model) -> None:
    batch = collate([([5, 6], [7, 8, 9, 10])] * 3)
    batch["labels"][0, 4] = -100  # two responses
    batch["labels"][1] = -100
    got = assay.score([batch], [IFD(model, CausalLM())])["ifd"].to_pylist()
    assert [math.isnan(value) for value in got] == [True, True, False]


def test_the_prompted_pass_is_shared(model) -> None:
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    task = CausalLM()
    table = assay.score([collate(PAIRS)], [IFD(model, task), Ensemble([model], task)])
    handle.remove()
    assert len(calls) == 2
    whole = assay.score([collate([([BOS, *p], r) for p, r in PAIRS])], [IFD(model, task), Ensemble([model], task)])
    assert whole["ifd_given"].to_pylist() == pytest.approx(whole["ensemble_mean_nll"].to_pylist(), rel=1e-5)
    assert table["ifd_given"].to_pylist()[0] != pytest.approx(table["ensemble_mean_nll"].to_pylist()[0], rel=1e-3)


def test_a_rule_keeps_the_highest_below_one(tmp_path) -> None:
    pytest.importorskip("duckdb")
    ratios = np.array([0.3, 1.0, 0.9, 1.7, math.nan, 0.99, 0.6], np.float32)
    folder = make_scores(tmp_path, {"a": {"ifd": ratios}})
    rule = RuleOptions(by="ifd", top="0.5", where="ifd < 1").rule()
    kept = curate(folder, "ifd", rule, str(tmp_path / "kept"), form="indices", where="ifd < 1").selection.mask
    assert np.flatnonzero(kept).tolist() == [2, 5]


def test_what_has_no_prompts_is_refused(model) -> None:
    batch = collate(PAIRS)
    del batch["labels"]
    with pytest.raises(
        ValueError, match=r"expected labels that are -100 where the prompt is \(in a recipe: task\.prompt"
    ):
        assay.score([batch], [IFD(model, CausalLM())])
    with pytest.raises(ValueError, match=r"the task is Classification; expected tasks\.CausalLM"):
        IFD(model, Classification())  # type: ignore[arg-type]
