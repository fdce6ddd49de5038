"""An ensemble of small models against the label: loss, agreement and uncertainty per sample.

Xiao & Zhu, *Foundations of Large Language Models*, chapter 4 (the idea); ``ops.ensemble_stats`` (the statistics).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay import ops
from assay.methods.base import Column, Method, Need
from assay.methods.label_quality import COLUMNS as LABEL_QUALITY
from assay.methods.label_quality import label_quality
from assay.methods.weights import shares
from assay.probe import Signals
from assay.tasks import CausalLM, Classification, Regression, Task
from assay.tasks.base import ByToken, base_task

STATISTICS = (
    Column("nll", "low", "−log Σ_k w_k p_k,y: the mixture's loss on the label, nats"),
    Column("mean_nll", "low", "−Σ_k w_k log p_k,y: the models' mean loss, nats"),
    Column("margin", "high", "p̄_y − max_{c≠y} p̄_c of the mixture p̄"),
    Column("agreement", "high", "Σ_k w_k [argmax z_k = y]: share of the models that vote for the label"),
    Column("el2n", "low", "‖p̄ − onehot(y)‖₂ of the mixture; low agrees with the label, high is hard or wrong"),
    Column("entropy", "none", "H(p̄), nats; does not see the label"),
    Column("expected_entropy", "none", "Σ_k w_k H(p_k), nats; does not see the label"),
    Column("mutual_information", "none", "entropy − expected_entropy (BALD), nats; does not see the label"),
    Column("confidence", "none", "max_c p̄_c; does not see the label"),
    Column("vote_entropy", "none", "entropy of the models' votes, nats; does not see the label"),
)
PREDICTION = Column("prediction", "none", "argmax_c p̄_c, the class the mixture would give")
TOKENS = (
    Column("mean_nll_tokens", "low", "−Σ_k w_k log p_k,y of each token, nats; NaN where none is predicted", None),
    Column("entropy_tokens", "none", "H(p̄) where each token is predicted, nats; does not see the token", None),
)
REGRESSION = (
    Column("mean", "none", "Σ_k w_k f_k: the models' mean prediction; of several outputs their mean"),
    Column("variance", "none", "Σ_k w_k (f_k − mean)², averaged over outputs; does not see the target"),
    Column("residual", "low", "(mean − y)², averaged over outputs"),
)

_PADDING = 1024  # a vocabulary is padded to a multiple of 128 for each of up to 8 devices


class Ensemble(Method):
    """K models' view of each sample's label.

    Columns, prefixed ``ensemble_``: the fields of ``ops.EnsembleStats``; for classification also the predicted class
    and cleanlab's label-quality scores. A sample with several rows (a text) gets the mean over its predicted tokens.
    For regression: ``mean``, ``variance`` and ``residual`` of the models' predictions, w_k normalised to sum 1: the
    models' own losses have the weighted mean residual + variance.

    Language models of one vocabulary may have it padded differently: each keeps its own softmax, padding included, so
    that ``mean_nll`` is the mean of the losses they were trained on, and gives the tokens that it lacks probability 0.

    Args:
        models: K modules of any architectures over the same classes or vocabulary. To find wrong labels they must not
            have been trained on the samples they judge: see ``retrain.out_of_fold``.
        task: what a sample and a label are.
        weights: (K,), not negative; None: equal. ``label_quality.model_weights`` finds them from accuracy or log loss.
        tokens: also a list with a number for each of the sample's tokens, of ``mean_nll`` and of ``entropy``.
        name: prefix of the columns.

    Raises:
        ValueError: no model, weights that are none, output layers that differ by more than padding, labels that are
            probabilities, or ``tokens`` of samples that are none.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        models: Sequence[nn.Module],
        task: Task,
        weights: Sequence[float] | None = None,
        *,
        tokens: bool = False,
        name: str = "ensemble",
    ) -> None:
        if not models:
            raise ValueError("Ensemble: expected at least one model, got none")
        shares(weights, len(models))  # an error now, not after the models have run
        if getattr(task, "soft", False):
            raise ValueError(
                "Ensemble: compares predictions with one class per sample, and the task's labels are probabilities "
                "(soft); use methods that take losses or gradients, or labels that are classes"
            )
        if tokens and not isinstance(base_task(task), ByToken):
            raise ValueError(f"Ensemble: tokens: {type(task).__name__}'s samples are no tokens; leave it out")
        self.name, self.tokens = name, tokens
        self.models = list(models)
        self.task = task
        self.weights = [float(w) for w in weights] if weights is not None else None
        self._per_sample = isinstance(task, Classification)
        self._numbers = isinstance(task, Regression)
        self._most(_told_classes(models))  # an error now, too

    @property
    def columns(self) -> Sequence[Column]:
        extra = (PREDICTION, *LABEL_QUALITY) if self._per_sample else TOKENS if self.tokens else ()
        columns = REGRESSION if self._numbers else (*STATISTICS, *extra)
        return [Column(f"{self.name}_{c.name}", c.keep, c.description, c.width) for c in columns]

    def needs(self) -> Mapping[str, Need]:
        return {f"model{k}": Need(model, self.task, logits=True) for k, model in enumerate(self.models)}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        members = [signals[f"model{k}"] for k in range(len(self.models))]
        first = members[0]
        if self._numbers:
            scores = self._regression_scores(members)
        else:
            scores = self._fused_scores(members) or self._scores(members)
        if first.rows is not None and first.labels is not None:
            by_row = scores
            scores = {f: sample_means(v, first.labels, first.rows, first.samples) for f, v in by_row.items()}
            task = base_task(self.task)
            if self.tokens and isinstance(task, ByToken):
                for column in TOKENS:
                    values = by_row[column.name.removesuffix("_tokens")]
                    scores[column.name] = task.by_token(values, first.labels, first.samples)
        return {f"{self.name}_{field}": value for field, value in scores.items()}

    def _scores(self, members: Sequence[Signals]) -> dict[str, Tensor]:
        logits = []
        for k, member in enumerate(members):
            if member.logits is None or member.labels is None:
                raise ValueError(
                    f"Ensemble: model {k} gives no logits and labels under {type(self.task).__name__} (labels that are "
                    "probabilities are none)"
                )
            logits.append(member.logits)
        labels = members[0].labels
        assert labels is not None
        classes = self._most([own.shape[1] for own in logits])
        logits = [F.pad(own, (0, classes - own.shape[1]), value=-torch.inf) for own in logits]
        return ensemble_scores(logits, labels, self.weights, classes=self._per_sample)

    def _fused_scores(self, members: Sequence[Signals]) -> dict[str, Tensor] | None:
        """The same where every model is a fused language model, whose logits are never made."""
        layers = [member.output_layer for member in members if member.output_layer is not None]
        if len(layers) < len(members):
            return None
        classes = self._most([len(layer.weight) for layer in layers])
        layers = [layer.padded(classes) for layer in layers]
        stats = ops.linear_ensemble_stats(
            [layer.hidden for layer in layers],
            [layer.weight for layer in layers],
            members[0].labels,
            bias=[layer.bias for layer in layers],
            weights=self.weights,
        )
        return {column.name: getattr(stats, column.name) for column in STATISTICS}

    def _most(self, classes: Sequence[int]) -> int:
        """The most of the models' classes; ValueError unless they are as many, or one vocabulary's."""
        most, least = max(classes, default=0), min(classes, default=0)
        if most - least > (_PADDING if isinstance(base_task(self.task), CausalLM) else 0):
            raise ValueError(
                f"Ensemble: its models have output layers of {', '.join(map(str, classes))} classes (those of one "
                f"vocabulary differ by {_PADDING} rows of padding at most); score them in ensembles of their own"
            )
        return most

    def _regression_scores(self, members: Sequence[Signals]) -> dict[str, Tensor]:
        predictions = [member.prediction for member in members if member.prediction is not None]
        target = members[0].target
        if target is None or len(predictions) < len(members):
            raise ValueError(f"Ensemble: a model gives no prediction under {type(self.task).__name__}")
        return regression_scores(predictions, target, self.weights)

    def metadata(self) -> dict[str, str]:
        return {"models": str(len(self.models)), "weights": str(self.weights or "equal")}


def ensemble_scores(
    logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float] | None = None, *, classes: bool = True
) -> dict[str, Tensor]:
    """The ensemble's columns (without prefix) from logits at hand, such as ``retrain.out_of_fold``'s.

    Args:
        logits: (K, N, C) or K tensors (N, C).
        labels: (N,) int64.
        weights: (K,) or None for equal.
        classes: also the predicted class and the label-quality scores.

    Returns:
        (N,) float32 per name.
    """
    stats = ops.ensemble_stats(logits, labels, weights=weights)
    scores: dict[str, Tensor] = {column.name: getattr(stats, column.name) for column in STATISTICS}
    if classes:
        assert stats.prediction is not None
        prediction = stats.prediction.float()
        scores["prediction"] = prediction.masked_fill(prediction < 0, torch.nan)
        scores |= label_quality(logits, labels, weights if weights is not None else "uniform")
    return scores


def regression_scores(
    predictions: Sequence[Tensor], target: Tensor, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The ensemble's columns (without prefix) of a regression.

    Args:
        predictions: K tensors of the target's shape.
        target: (B, ...).
        weights: (K,) or None for equal.

    Returns:
        (B,) float32 per name; sums are taken in float64.
    """
    stacked = torch.stack([prediction.double().to(target.device) for prediction in predictions])
    stacked = stacked.flatten(2) if stacked.ndim > 2 else stacked[:, :, None]
    w = torch.as_tensor(shares(weights, len(stacked)), dtype=torch.float64, device=target.device)[:, None, None]
    mean = (w * stacked).sum(0)
    scores = {
        "mean": mean.mean(1),
        "variance": (w * (stacked - mean).square()).sum(0).mean(1),
        "residual": (mean - target.double().reshape(mean.shape)).square().mean(1),
    }
    return {name: values.float() for name, values in scores.items()}


def _told_classes(models: Sequence[nn.Module]) -> list[int]:
    """The sizes of their output layers, of those models that tell: language models."""
    layers = [getattr(model, "get_output_embeddings", lambda: None)() for model in models]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return [weight.shape[0] for weight in weights if isinstance(weight, Tensor)]


def sample_means(values: Tensor, labels: Tensor, rows: Tensor, samples: int) -> Tensor:
    """Mean of per-row values over each sample's predicted rows; NaN for a sample without any.

    (N,), (N,) with −100 where nothing is predicted, (N,) the owning sample -> (samples,) float32.
    """
    predicted = labels >= 0
    owner = rows[predicted]
    totals = torch.zeros(samples, dtype=torch.float64, device=values.device)
    totals.index_add_(0, owner, values[predicted].double())
    counts = torch.bincount(owner, minlength=samples)
    return (totals / counts).float()  # 0 / 0 is NaN
