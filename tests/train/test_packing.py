"""Packed rows: scores and weighted gradients are those of each sample alone, by autograd."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from assay import Kronecker, Rademacher
from assay.methods import GradMimic, GraNd
from assay.probe.gradient import PerSampleGradient
from assay.probe.packing import Packed, Packing
from assay.probe.terms import Outer, Scatter
from assay.tasks import CausalLM
from assay.train import Reweighter, sample_means
from assay.train.collation import WithIds
from assay.train.flattening import SEQ_IDX, Flattened, flattens
from tests import small_architectures
from tests.train.small_models import moved

LENGTHS = (9, 2, 5, 17, 3)


def tokens_of(lengths: Any = LENGTHS) -> list[Tensor]:
    return [torch.randint(3, small_architectures.TOKENS, (n,)) for n in lengths]


def rows_of(samples: list[Tensor], rows: Any = ((0, 1, 2, 3, 4),), pad: int = 3) -> tuple[Tensor, ...]:
    """(R, T) of ids, position ids, targets and the sample of each position, which rows of sample numbers hold."""
    width = max(sum(len(samples[b]) for b in row) for row in rows) + pad
    ids, places = torch.zeros(2, len(rows), width, dtype=torch.long)
    targets, owner = torch.full((len(rows), width), -100), torch.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        start = 0
        for b in row:
            here = slice(start, start := start + len(samples[b]))
            ids[r, here], places[r, here], owner[r, here] = samples[b], torch.arange(len(samples[b])), b
            targets[r, here.start : here.stop - 1] = samples[b][1:]
    return ids, places, targets, owner


def packed_losses(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    ids, places, targets, owner = rows
    logits = model(input_ids=ids, position_ids=places, use_cache=False).logits
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(ids.shape)
    return sample_means(each, targets != -100, owner)


def alone(model: nn.Module, samples: list[Tensor]) -> dict[str, Tensor]:
    """(B, *shape) by parameter."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each = []
    for ids in samples:
        loss = F.cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:])
        each.append(torch.autograd.grad(loss, list(parameters.values())))
    return {name: torch.stack([grads[i] for grads in each]) for i, name in enumerate(parameters)}


def made(name: str, **changes: Any) -> nn.Module:
    if name == "mixtral":
        sizes = small_architectures._CAUSAL | {"num_local_experts": 4, "num_experts_per_tok": 2}
        config = transformers.MixtralConfig(**sizes, **changes)
    else:
        config = small_architectures.config(name, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval() if name == "gpt2" else model  # without dropout


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "mixtral"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_and_scores_are_those_of_each_sample_alone(name, recompute) -> None:
    model = made(name)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    reference = moved(model, by=0.05)
    samples = tokens_of()
    gradients = alone(model, samples)
    step = {n: (dict(reference.named_parameters())[n] - p).detach() for n, p in model.named_parameters()}
    norm = sum(float(v.double().square().sum()) for v in step.values()) ** 0.5
    scores = -sum((gradients[n].double() * v).flatten(1).sum(1) for n, v in step.items()) / norm
    weights = 5 * (scores / 0.2).softmax(0)
    for rows in (((0, 1, 2, 3, 4),), ((3, 1), (4, 0, 2))):
        own = copy.deepcopy(model)
        reweighter = Reweighter(own, GradMimic(own, reference, CausalLM()), temperature=0.2, recompute=recompute)
        batch = rows_of(samples, rows)
        if len(rows) > 1 and name == "mixtral":
            batch = tuple(x[:, : x.shape[1] - 3] for x in batch)
        with reweighter.packed(batch[3]):
            losses = packed_losses(own, batch)
        reweighter.backward(losses, range(5))
        torch.testing.assert_close(reweighter.weights.double(), weights, rtol=1e-4, atol=1e-4)
        for n, p in own.named_parameters():
            expected = torch.einsum("b,b...->...", weights.float(), gradients[n]) / 5
            scale = float(expected.abs().max())
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5 * max(scale, 1e-3), msg=n)


def test_squared_norms_of_a_weight_that_is_an_output_layer_too() -> None:
    model = made("qwen2")
    other, samples = copy.deepcopy(model), tokens_of()
    reweighter = Reweighter(model, GraNd(model, CausalLM()), mode="observe")
    for size in (5, 1, 3):
        rows = rows_of(samples[:size], (range(size),))
        with reweighter.packed(rows[3]):
            losses = packed_losses(model, rows)
        reweighter.backward(losses)
        expected = sum(g.double().square().flatten(1).sum(1) for g in alone(other, samples[:size]).values()).sqrt()
        found = torch.tensor(reweighter.table()["grand"].to_pylist()[-size:], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(losses.detach(), torch.tensor(reweighter.table()["loss"].to_pylist()[-size:]))


def test_groups_hold_each_sample_once_and_little_padding() -> None:
    lengths = [1, 1, 2, 3, 40, 41, 7, 19, 20, 80]
    owner = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths))[torch.randperm(sum(lengths))]
    packing = Packing.of(F.pad(owner, (0, 6), value=-1).view(4, -1))
    assert sorted(b for group in packing.groups for b in group.samples.tolist()) == list(range(10))
    flat = packing.seq_idx.flatten()
    for group in packing.groups:
        for b, places in zip(group.samples.tolist(), group.places.tolist(), strict=True):
            own = [place for place in places if place >= 0]
            assert own == torch.nonzero(flat == b).flatten().tolist()
            assert len(own) * 2 >= len(places)
    values = torch.arange(float(flat.numel())).view(4, -1)
    sums = [float(values.flatten()[flat == b].sum()) for b in range(10)]
    assert packing.sums(values).tolist() == sums


def test_what_is_said_of_packed_gradients_is_said_of_each_sample() -> None:
    owner = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3, -1]])
    packing = Packing.of(owner)
    left, right, ids = torch.randn(12, 4), torch.randn(12, 3), torch.randint(4, (12,))

    def cut(group: Any) -> list[Any]:
        rows = (group.rows(x) for x in (left, right))
        return [Outer(*rows), Scatter(group.rows(ids), group.rows(right))]

    shape = torch.Size((4, 3))
    whole = PerSampleGradient(
        shape, [Packed([(g.samples, PerSampleGradient(shape, cut(g))) for g in packing.groups], 4)]
    )
    scatter = F.one_hot(ids, 4).float()
    each = [(left + scatter)[owner[0] == b].T @ right[owner[0] == b] for b in range(4)]
    dense = torch.stack(each)
    direction, factors = torch.randn(4, 3), torch.rand(4)
    torch.testing.assert_close(whole.dense(), dense)
    for gradient in (whole, whole.multiplied_out()):
        torch.testing.assert_close(gradient.dot(direction), (dense * direction).flatten(1).sum(1))
        torch.testing.assert_close(gradient.sqnorm(), dense.square().flatten(1).sum(1))
        torch.testing.assert_close(gradient.weighted(factors), torch.einsum("b,bij->ij", factors, dense))
        torch.testing.assert_close(gradient.scaled(factors).dense(), dense * factors[:, None, None])
        torch.testing.assert_close(torch.cat([part.dense() for part in gradient.split(3)]), dense)
        torch.testing.assert_close(gradient.total()[0], dense.sum(0))
        for sketch in (Kronecker(2, 2), Rademacher(8)):
            plain = PerSampleGradient(shape, [Outer(torch.eye(4).expand(4, -1, -1), dense)])
            torch.testing.assert_close(gradient.sketch(sketch), plain.sketch(sketch))


@pytest.mark.parametrize(
    ("seq_idx", "message"),
    [
        (torch.zeros(5, dtype=torch.long), r"expected \(R, T\) of int64, .* found \(5,\)"),
        (torch.zeros(1, 5), "found .* of torch.float32"),
        (torch.tensor([[0, 2]]), "found no position of sample 1"),
        (torch.tensor([[0, -2]]), "found a sample -2"),
        (torch.tensor([[-1, -1]]), "found none"),
        (torch.zeros(1, 0, dtype=torch.long), "found none"),
    ],
)
def test_a_sample_of_each_position_that_is_none(seq_idx, message) -> None:
    with pytest.raises(ValueError, match=message):
        Packing.of(seq_idx)


def running(rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With position ids that go on from one sample to the next."""
    ids, _, targets, owner = rows
    return ids, torch.arange(ids.shape[1]).expand(len(ids), -1), targets, owner


BEHIND = {"llama": "*layers.1.mlp*", "gpt2": "*h.1.mlp*"}  # the last attention


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layers", ["*attn*", "*lm_head", "behind"])
@pytest.mark.parametrize("frozen", [False, True])
def test_samples_that_see_each_other_are_found_whatever_is_tapped(name, layers, frozen) -> None:
    """Also after batches in which nobody has company: one sample, or one in each row."""
    model = made(name, tie_word_embeddings=False)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
    samples = tokens_of()
    scored = GraNd(model, CausalLM(), BEHIND[name] if layers == "behind" else layers)
    reweighter = Reweighter(model, scored, mode="observe")
    for rows in (((0,),), ((3,), (4,))):
        batch = running(rows_of([samples[b] for row in rows for b in row], [[i] for i in range(len(rows))]))
        with reweighter.packed(batch[3]):
            losses = packed_losses(model, batch)
        reweighter.backward(losses)
    batch = running(rows_of(samples))
    with reweighter.packed(batch[3]):
        losses = packed_losses(model, batch)
    with pytest.raises(RuntimeError, match="samples of a packed row see one another"):
        reweighter.backward(losses)


def test_samples_apart_pass_under_autocast() -> None:
    model, rows = made("llama"), rows_of(tokens_of())
    reweighter = Reweighter(model, GraNd(model, CausalLM(), "*norm*"), mode="observe")
    with reweighter.packed(rows[3]), torch.autocast("cpu", torch.bfloat16):
        losses = packed_losses(model, rows)
    reweighter.backward(losses)
    assert len(reweighter.table()) == 5


def test_a_mask_that_comes_later_is_looked_at_anew() -> None:
    """With an attention mask, or a cache, transformers takes a row for one sample."""
    model, rows = made("llama"), rows_of(tokens_of())
    reweighter = Reweighter(model, GraNd(model, CausalLM(), "*lm_head"), mode="observe")
    for more in ({}, {"attention_mask": torch.ones_like(rows[0])}):
        with reweighter.packed(rows[3]):
            logits = model(input_ids=rows[0], position_ids=rows[1], use_cache=False, **more).logits
        each = F.cross_entropy(logits.mT, rows[2], reduction="none")
        losses = sample_means(each, rows[2] != -100, rows[3])
        if not more:
            reweighter.backward(losses)
    with pytest.raises(RuntimeError, match="samples of a packed row see one another"):
        reweighter.backward(losses)


class Odd(nn.Module):
    """Bare parameters, of which two meet every position, one that does not, and a convolution along the row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale = nn.Embedding(9, 4), nn.Parameter(torch.randn(4))
        self.turn, self.places = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(8, 4))
        self.along = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        h = F.linear(self.table(ids) * (2 * self.scale), self.turn.T)
        return self.head(self.along(h.mT).mT + self.places[: ids.shape[1]])


def losses_of(model: nn.Module, ids: Tensor, owner: Tensor) -> Tensor:
    each = F.cross_entropy(model(ids).mT, ids, reduction="none")
    return sample_means(each, owner >= 0, owner)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("along", "layer 'along' .* no row of its own for each of the .*7.* packed positions"),
        ("", "parameter 'places'.*takes it together with the samples"),
    ],
)
def test_what_has_no_gradients_by_position_is_refused(layer, message) -> None:
    model, owner = Odd(), torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    reweighter = Reweighter(model, GraNd(model, CausalLM(), layer), mode="observe")
    with reweighter.packed(owner), pytest.raises(RuntimeError, match=message):
        reweighter.backward(losses_of(model, owner, owner))


@pytest.mark.parametrize("shape", [(1, 8), (2, 4)])
def test_bare_parameters_that_meet_every_position(shape) -> None:
    model, ids = Odd(), torch.randint(9, (7,))
    model.places.requires_grad_(False).zero_()
    owner = torch.tensor([0, 0, 1, 1, 1, 2, 2, -1]).view(shape)
    layers = ["*", "!along", "!places"]
    reweighter = Reweighter(model, GraNd(model, CausalLM(), layers), mode="filter", keep=0.3, layers=layers)
    with reweighter.packed(owner):
        losses = losses_of(model, F.pad(ids, (0, 1)).view(shape), owner)
    reweighter.backward(losses)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    reweighter.detach()
    each, flat = [], owner.flatten()[:7]
    for b in range(3):
        own = F.cross_entropy(model(ids[flat == b][None]).mT, ids[flat == b][None])
        each.append(dict(zip(found, torch.autograd.grad(own, [model.get_parameter(n) for n in found]), strict=True)))
    scored = [name for name in found if not name.startswith("along")]
    norms = [float(sum(grads[n].square().sum() for n in scored).sqrt()) for grads in each]
    torch.testing.assert_close(torch.tensor(reweighter.table()["grand"].to_pylist()), torch.tensor(norms))
    best = norms.index(max(norms))
    for name in scored:
        torch.testing.assert_close(found[name], each[best][name], rtol=1e-4, atol=1e-6, msg=name)


class Shared(nn.Module):
    """A weight that is a layer's and is multiplied with by hand as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.turn = nn.Embedding(9, 4), nn.Parameter(torch.randn(4, 4))
        self.line = nn.Linear(4, 4, bias=False)
        self.line.weight = self.turn

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return (self.line(h) + h @ self.turn) @ self.table.weight.detach().T


def test_a_layer_s_weight_that_is_used_bare_as_well() -> None:
    model, owner = Shared(), torch.tensor([[0] * 9 + [1, 1, 2]])
    ids = torch.randint(9, owner.shape)
    reweighter = Reweighter(model, GraNd(model, CausalLM(), ["*", "!table*"]), mode="observe")
    with reweighter.packed(owner):
        losses = losses_of(model, ids, owner)
    reweighter.backward(losses)
    reweighter.detach()
    norms = []
    for b in range(3):
        own = ids[owner == b][None]
        norms.append(torch.autograd.grad(F.cross_entropy(model(own).mT, own), model.turn)[0].norm())
    torch.testing.assert_close(torch.tensor(reweighter.table()["grand"].to_pylist()), torch.stack(norms))


def test_means_by_sample() -> None:
    losses, owner = torch.arange(6.0)[None], torch.tensor([[0, 0, 1, 1, 1, -1]])
    counted = torch.tensor([[True, False, True, True, False, True]])
    assert sample_means(losses, counted, owner).tolist() == [0, 2.5]
    assert sample_means(losses, counted).tolist() == [2.5]
    many, one = torch.full((1, 1000), 2.0, dtype=torch.bfloat16), torch.zeros(1, 1000, dtype=torch.long)
    assert sample_means(many, one == 0, one).tolist() == sample_means(many, one == 0).tolist() == [2.0]
    with pytest.raises(RuntimeError, match="sample 1 of the batch has nothing to predict"):
        sample_means(losses, counted & (owner != 1), owner)
    with pytest.raises(ValueError, match="expected one shape"):
        sample_means(losses[0], counted, owner)
    with pytest.raises(ValueError, match=r"seq_idx \(1, 5\); expected \(1, 6\)"):
        sample_means(losses, counted, owner[:, :5])


# ---- what collators make


def flat(features: list[dict[str, Any]], **options: Any) -> Any:
    bare = transformers.DataCollatorWithFlattening(return_seq_idx=True, **options)
    return Flattened(bare, "id")(features)


def test_a_row_of_all_samples_has_their_ids() -> None:
    batch = flat([{"id": "a", "input_ids": [1, 2, 3]}, {"id": 7, "input_ids": [4]}, {"id": "b", "input_ids": [5, 6]}])
    assert batch["id"] == ["a", "7", "b"]
    assert batch[SEQ_IDX].tolist() == batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    rows = datasets.Dataset.from_list(
        [
            {"id": ["a", "a", "b"], "input_ids": [1, 2, 3], "seq_lengths": [2, 1], "position_ids": [0, 1, 0]},
            {"id": ["c", "d"], "input_ids": [4, 5, 6], "seq_lengths": [1, 2], "position_ids": [0, 0, 1]},
        ]
    )

    def packed(features: Any) -> Any:
        names = ("input_ids", "position_ids")
        return {name: torch.tensor([[x for row in features for x in row[name]]]) for name in names}

    batch = Flattened(packed, "id")(list(rows))
    assert batch["id"] == ["a", "b", "c", "d"]
    assert batch[SEQ_IDX].tolist() == [[0, 0, 1, 2, 3, 3]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([{"id": ["a", "b"], "input_ids": [1, 2, 3], "seq_lengths": [3]}], "packed row of 1 samples has 2 ids"),
        ([{"id": ["a", "b", "b"], "input_ids": [1, 2, 3], "seq_lengths": [2, 1]}], "has ids of several"),
        ([{"id": ["a", "b"], "input_ids": [1, 2, 3], "seq_lengths": [2, 2]}], r"3 tokens has samples of \[2, 2\]"),
        ([{"id": "a", "input_ids": [1, 2, 3], "seq_lengths": [2, 1]}], "an id per token, or one for each of its 2"),
        ([{"id": "a", "input_ids": [1, 2]}, {"input_ids": [1]}], "a training sample has no 'id'"),
        ([{"id": "a", "input_ids": [1, 2, 3], "seq_lengths": [3]}, {"id": "b", "input_ids": []}], r"samples of \[0\]"),
    ],
)
def test_rows_whose_ids_do_not_fit(features, message) -> None:
    with pytest.raises(ValueError, match=message):
        flat(features)


def test_collators_that_hide_the_samples() -> None:
    features = [{"id": "a", "input_ids": [1, 2, 3]}, {"id": "b", "input_ids": [4, 5]}]
    with pytest.raises(ValueError, match="gives no 'position_ids'"):
        flat(features, return_position_ids=False)
    assert flattens(type("Mine", (transformers.DataCollatorWithFlattening,), {})())
    turned = transformers.DataCollatorWithFlattening()
    with pytest.raises(ValueError, match="do not start anew where its samples do"):
        Flattened(lambda rows: turned(rows[::-1]), "id")(features)
    with pytest.raises(ValueError, match=r"made \(1, 3\) of samples with 5 tokens"):
        Flattened(lambda rows: turned(rows[:1]), "id")(features)


def test_collators_that_put_samples_in_another_order() -> None:
    def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        mask = [torch.ones_like(own) for own in ids]
        names = {"input_ids": ids, "attention_mask": mask}
        return {name: nn.utils.rnn.pad_sequence(own, batch_first=True) for name, own in names.items()}

    features = [{"id": "a", "input_ids": [4, 5]}, {"id": "b", "input_ids": [1, 2, 3]}, {"id": "c", "input_ids": [6, 0]}]
    assert WithIds(padded, "id")(features)["id"] == ["a", "b", "c"]
    for turned in (lambda rows: sorted(rows, key=lambda row: -len(row["input_ids"])), lambda rows: rows[::-1]):
        with pytest.raises(ValueError, match=r"puts sample [12] of a batch in the place of sample 0"):
            WithIds(lambda rows, turned=turned: padded(turned(rows)), "id")(features)
    cut = WithIds(lambda rows: padded([{"input_ids": row["input_ids"][-2:]} for row in rows]), "id")
    assert cut([{"id": "a", "input_ids": [1, 2, 3]}, {"id": "b", "input_ids": [2, 3]}])["id"] == ["a", "b"]
    masked = WithIds(lambda rows: {**padded(rows), "input_ids": torch.ones(3, 3, dtype=torch.long)}, "id")(features)
    assert masked["id"] == ["a", "b", "c"]
