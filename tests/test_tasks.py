"""Tasks: what a sample's loss is, and that nothing but the sample decides it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import tasks
from assay.tasks import CausalLM, Classification, Contrastive, Regression, Sampled, Task, row_losses


class Fixed(nn.Module):
    """Returns what it is told to, and remembers how it was called."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output, self.called = output, {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = kwargs
        return self.output


class Bigram(nn.Module):
    """The smallest causal language model; takes ids and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_every_task_satisfies_the_protocol() -> None:
    for task in (Classification(), CausalLM(), Regression(), Contrastive()):
        assert isinstance(task, Task)


def test_nothing_here_imports_transformers() -> None:
    code = "import sys, assay.tasks, assay.probe; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- row_losses


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("chunk", [8, 1 << 24])  # several chunks of rows, and one
def test_row_losses_and_their_gradient(
    scale: float, offset: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.losses, "_CHUNK", chunk)
    torch.manual_seed(0)
    logits = (torch.randn(6, 4) * scale + offset).requires_grad_()
    labels, weights = torch.tensor([0, 3, -100, 1, 1, 2]), torch.rand(6)
    found = row_losses(logits, labels)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    (truth,) = torch.autograd.grad((weights * expected).sum(), exact)
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_losses_of_half_precision_logits_are_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 50).to(dtype).requires_grad_()
    labels = torch.randint(50, (5,))
    losses = row_losses(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), labels, reduction="none"))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient.dtype == dtype


def test_row_losses_keep_a_nan_in_its_row_and_ignored_rows_without_gradient() -> None:
    logits = torch.randn(3, 4)
    logits[0, 1] = logits[1, 2] = torch.nan
    logits.requires_grad_()
    losses = row_losses(logits, torch.tensor([0, -100, 2]))
    assert losses.isnan().tolist() == [True, False, False]
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(gradient[1], torch.zeros(4))
    assert gradient[2].isfinite().all()


def test_row_losses_with_impossible_classes() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    losses = row_losses(logits, torch.tensor([0]))
    torch.testing.assert_close(losses.detach(), torch.tensor([1.0]).exp().add(1).log())
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert gradient[0, 1] == 0


# ---- classification


@pytest.mark.parametrize("wrap", [lambda z: z, lambda z: SimpleNamespace(logits=z)])
def test_classification(wrap: Any) -> None:
    logits, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1], dtype=torch.int32)
    task = Classification()
    outputs = task.forward(Fixed(wrap(logits)), (torch.zeros(4, 1), y))
    torch.testing.assert_close(outputs.losses, F.cross_entropy(logits, y.long(), reduction="none"))
    assert outputs.logits is logits
    assert outputs.rows is None
    assert task.size((torch.zeros(4, 1), y)) == 4


def test_classification_of_keyword_inputs_has_a_mask() -> None:
    x = {"input_ids": torch.zeros(2, 3).long(), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    model = Fixed(torch.zeros(2, 2))
    Classification().forward(model, (x, torch.tensor([0, 1])))
    assert set(model.called) == {"input_ids", "attention_mask"}
    mask = Classification().mask((x, torch.tensor([0, 1])))
    assert mask is not None
    assert mask.tolist() == [[True, True, False], [True, True, True]]


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_outside_the_classes_are_an_error(label: int) -> None:
    with pytest.raises(ValueError, match=rf"label {label} lies outside \[0, 3\)"):
        Classification().forward(Fixed(torch.zeros(2, 3)), (torch.zeros(2, 1), torch.tensor([0, label])))


def test_classification_errors_say_what_was_found() -> None:
    task, x = Classification(), torch.zeros(2, 1)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\) and labels of shape \(2,\)"):
        task.forward(Fixed(torch.zeros(2, 5, 3)), (x, torch.zeros(2).long()))
    with pytest.raises(TypeError, match=r"float32; expected integer"):
        task.forward(Fixed(torch.zeros(2, 3)), (x, torch.zeros(2)))
    with pytest.raises(TypeError, match=r"pair \(x, y\), got a dict with keys \['x'\]"):
        task.size({"x": x})
    with pytest.raises(TypeError, match="returned a SimpleNamespace"):
        task.forward(Fixed(SimpleNamespace()), (x, torch.zeros(2).long()))


def test_batches_are_moved_and_detached() -> None:
    x = torch.zeros(2, 1, requires_grad=True)
    moved = Classification().to(({"x": x, "name": "kept"}, torch.tensor([0, 1])), torch.device("meta"))
    assert moved[0]["x"].device.type == "meta"
    assert not moved[0]["x"].requires_grad
    assert moved[0]["name"] == "kept"


# ---- regression


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 2, 3)])
def test_regression_is_the_mean_of_squares(shape: tuple[int, ...]) -> None:
    prediction, y = torch.randn(shape), torch.randn(shape)
    outputs = Regression().forward(Fixed(prediction), (torch.zeros(4, 1), y))
    expected = torch.stack([F.mse_loss(p, t) for p, t in zip(prediction, y, strict=True)])
    torch.testing.assert_close(outputs.losses, expected)
    assert outputs.logits is None


def test_regression_never_broadcasts() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1\) and target of shape \(4,\)"):
        Regression().forward(Fixed(torch.zeros(4, 1)), (torch.zeros(4, 1), torch.zeros(4)))


# ---- causal language models


def token_losses(model: nn.Module, ids: list[int]) -> Tensor:
    return F.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_causal_lm_reduces_over_predicted_tokens(reduction: Any) -> None:
    model = Bigram()
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    }
    outputs = CausalLM(reduction).forward(model, batch)
    reduce = getattr(torch, reduction)
    expected = torch.stack([reduce(token_losses(model, [1, 2, 3, 4])), reduce(token_losses(model, [5, 6]))])
    torch.testing.assert_close(outputs.losses, expected)
    assert outputs.labels.tolist() == [2, 3, 4, -100, 6, -100, -100, -100]
    assert outputs.rows.tolist() == [0] * 4 + [1] * 4


def test_causal_lm_does_not_copy_the_logits() -> None:
    logits = torch.randn(2, 3, 7)
    outputs = CausalLM().forward(Fixed(SimpleNamespace(logits=logits)), {"input_ids": torch.zeros(2, 3).long()})
    assert outputs.logits.data_ptr() == logits.data_ptr()
    assert outputs.logits.shape == (6, 7)


def test_given_labels_choose_what_is_predicted() -> None:
    """A prompt is not trained on; the token after it is, from the prompt's last position."""
    batch = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "labels": torch.tensor([[-100, -100, 3, 5]])}
    outputs = CausalLM().forward(Bigram(), batch)
    assert outputs.labels.tolist() == [-100, 3, 5, -100]
    expected = F.cross_entropy(Bigram()(torch.tensor([[2, 3]]))[0], torch.tensor([3, 5]))
    torch.testing.assert_close(outputs.losses, expected[None])


def test_padding_on_the_left_needs_positions() -> None:
    batch = {"input_ids": torch.tensor([[0, 0, 5, 6, 1]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    with pytest.raises(ValueError, match=r"pad on the right, or put position_ids"):
        CausalLM().forward(Bigram(), batch)
    model = Fixed(torch.randn(1, 5, 7))
    outputs = CausalLM().forward(model, {**batch, "position_ids": torch.tensor([[0, 0, 0, 1, 2]])})
    assert outputs.labels.tolist() == [-100, -100, 6, 1, -100]  # the padding does not predict the first token
    assert model.called["use_cache"] is False
    assert set(model.called) == {"input_ids", "attention_mask", "position_ids", "use_cache"}


def test_texts_with_nothing_to_predict_are_nan_and_harm_nobody() -> None:
    model = Bigram()
    batch = {
        "input_ids": torch.tensor([[1, 2], [3, 0], [0, 0]]),
        "attention_mask": torch.tensor([[1, 1], [1, 0], [0, 0]]),
    }
    outputs = CausalLM().forward(model, batch)
    assert outputs.losses.isnan().tolist() == [False, True, True]
    (gradient,) = torch.autograd.grad(outputs.losses.sum(), model.table.weight)
    assert gradient.isfinite().all()
    assert gradient[[0, 3]].eq(0).all()


def test_causal_lm_errors_say_what_was_found() -> None:
    task, ids = CausalLM(), torch.tensor([[1, 2, 9]])
    with pytest.raises(ValueError, match=r"label 9 lies outside \[0, 7\) or -100"):
        task.forward(Fixed(torch.zeros(1, 3, 7)), {"input_ids": ids})
    with pytest.raises(ValueError, match=r"logits of shape \(1, 2, 7\) for input_ids of shape \(1, 3\)"):
        task.forward(Fixed(torch.zeros(1, 2, 7)), {"input_ids": ids})
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 3, 3\)"):
        task.mask({"input_ids": ids, "attention_mask": torch.ones(1, 1, 3, 3)})
    with pytest.raises(ValueError, match=r"labels of shape \(1, 2\)"):
        task.forward(Fixed(torch.zeros(1, 3, 7)), {"input_ids": ids, "labels": ids[:, 1:]})
    with pytest.raises(ValueError, match=r"input_ids of shape \(3,\)"):
        task.size({"input_ids": ids[0]})
    with pytest.raises(TypeError, match="'input_ids', got a tuple of 2"):
        task.size((ids, ids))
    with pytest.raises(ValueError, match="reduction 'max'"):
        CausalLM("max")  # type: ignore[arg-type]


# ---- contrastive


def clip_loss(image: Tensor, text: Tensor, scale: float) -> Tensor:
    similarity = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(similarity, labels) + F.cross_entropy(similarity.T, labels)) / 2


def test_contrastive_losses_average_to_the_clip_loss() -> None:
    image, text = F.normalize(torch.randn(4, 3), dim=1), F.normalize(torch.randn(4, 3), dim=1)
    outputs = Contrastive().forward(Fixed((image, text, 9.0)), (torch.zeros(4, 1), torch.zeros(4, 1)))
    torch.testing.assert_close(outputs.losses.mean(), clip_loss(image, text, 9.0))
    torch.testing.assert_close(outputs.logits, 9 * image @ text.T)
    assert outputs.labels.tolist() == [0, 1, 2, 3]


def test_contrastive_sample_gradients_reach_only_the_samples_own_embeddings() -> None:
    image, text = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    losses = Contrastive(scale=2.0).forward(Fixed((image, text)), (image, text)).losses
    for gradient in torch.autograd.grad(losses[1], [image, text]):
        assert gradient[1].abs().min() > 0
        assert gradient[[0, 2, 3]].eq(0).all()


def test_contrastive_scale_comes_from_the_model() -> None:
    image, text = torch.randn(2, 3), torch.randn(2, 3)
    batch = torch.zeros(2, 1), {"input_ids": torch.zeros(2, 1)}
    model = Fixed(SimpleNamespace(image_embeds=image, text_embeds=text))
    with pytest.raises(ValueError, match=r"Contrastive\(scale=100\.0\)"):
        Contrastive().forward(model, batch)
    model.logit_scale = nn.Parameter(torch.tensor(9.0).log())
    torch.testing.assert_close(Contrastive().forward(model, batch).losses.mean(), clip_loss(image, text, 9.0))
    assert set(model.called) == {"pixel_values", "input_ids"}
    torch.testing.assert_close(Contrastive(2.0).forward(model, batch).losses.mean(), clip_loss(image, text, 2.0))


def test_contrastive_errors_say_what_was_found() -> None:
    batch = torch.zeros(2, 1), torch.zeros(2, 1)
    with pytest.raises(TypeError, match="returned a Tensor"):
        Contrastive().forward(Fixed(torch.zeros(2, 3)), batch)
    with pytest.raises(ValueError, match=r"\(2, 3\) and text_embeds of shape \(3, 3\)"):
        Contrastive().forward(Fixed((torch.zeros(2, 3), torch.zeros(3, 3), 1.0)), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_losses_and_their_gradient_are_cross_entropys(dtype: torch.dtype) -> None:
    """Offsets, impossible labels and ignored rows among them."""
    logits = (5 * torch.randn(40, 300)).to(dtype)
    logits[3] += 1000
    labels = torch.randint(300, (40,))
    logits[5, labels[5]] = -torch.inf
    logits[6, (labels[6] + 1) % 300] = -torch.inf
    labels[7] = tasks.IGNORE
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weights = torch.rand(40, dtype=torch.float64)
    losses = row_losses(ours, labels)
    (losses * weights.to(losses.dtype)).sum().backward()
    want = F.cross_entropy(theirs, labels, reduction="none", ignore_index=tasks.IGNORE)
    (want * weights).sum().backward()
    torch.testing.assert_close(losses.double(), want.detach(), rtol=2e-6, atol=2e-6)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


# ---- labels drawn from the model


def test_drawn_labels_go_where_the_task_puts_them() -> None:
    """Position t of a language model has the token at t + 1 for its label, which only the task knows."""
    batch = {
        "input_ids": torch.randint(7, (3, 5)),
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5]),
    }
    task, model = CausalLM(), Bigram()
    own = task.forward(model, batch)
    assert own.labels is not None
    again = task.forward(model, task.relabelled(batch, own.labels))
    assert torch.equal(again.labels, own.labels)
    assert torch.equal(again.losses, own.losses)
    drawn = Sampled(task, seed=3).forward(model, batch)
    assert torch.equal(drawn.labels == -100, own.labels == -100)
    assert torch.equal(drawn.losses, Sampled(task, seed=3).unfused().forward(model, batch).losses)
    x, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    assert Classification().relabelled((x, y), y.flip(0))[1].tolist() == [1, 1, 2, 0]
    with pytest.raises(ValueError, match="Regression has no distribution of labels"):
        Sampled(Regression()).forward(Fixed(x), (x, x))
