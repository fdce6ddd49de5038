"""The peers, where they are installed: each by its own code on the board's checkpoints, with its own defaults.

What differs from a default is in the label. Every adapter takes tensors, and gives (N, Q), high where a row helps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.quality.leaderboard.board import Board, NotHere
from benchmarks.quality.leaderboard.cheap import last_hidden
from benchmarks.quality.leaderboard.entries import entry
from benchmarks.quality.leaderboard.gradients import K

Array = NDArray[np.float64]
Columns = tuple[Tensor, ...]
BATCH = 50


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Progress bars and logs go nowhere."""
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w") as sink,
            contextlib.redirect_stderr(sink),
            contextlib.redirect_stdout(sink),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def columns(batch: Any) -> Columns:
    return tuple(batch.values()) if isinstance(batch, Mapping) else tuple(batch)


def data_set(batch: Any) -> TensorDataset:
    return TensorDataset(*columns(batch))


def loader(batch: Any) -> DataLoader[Any]:
    return DataLoader(data_set(batch), batch_size=BATCH)


def logits_of(board: Board, network: Any, given: Any) -> tuple[Tensor, Tensor]:
    """(B, T, C) logits of what is predicted, and the labels (B, T)."""
    if board.texts is None:
        return network(given[0])[:, None], given[1][:, None]
    return network(given[0])[:, :-1], given[0][:, 1:]


def nlls(board: Board, network: Any, given: Any) -> Tensor:
    """(B, T)."""
    logits, labels = logits_of(board, network, given)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def margins(nll: Tensor) -> Tensor:
    """log(p / (1 − p)) summed over predictions."""
    return (-nll - torch.log(-torch.expm1(-nll))).sum(1)


# ---- traker


@entry("traker TRAK", "peer", module="trak")
def traker(board: Board) -> Array:
    from trak import TRAKer

    models, size = board.ensemble, board.size
    with tempfile.TemporaryDirectory() as folder, quiet():

        def peer() -> Any:
            return TRAKer(
                model=deepcopy(models[0]),  # it loads every checkpoint into it
                task="image_classification" if board.texts is None else _language_modelling(board)(),
                train_set_size=size,
                save_dir=folder,
                device="cpu",
                proj_dim=K,
                use_half_precision=False,
            )

        train, given = peer(), list(columns(board.pool))
        for i, model in enumerate(models):
            train.load_checkpoint(model.state_dict(), model_id=i)
            for part in torch.arange(size).split(BATCH):
                train.featurize(batch=[column[part] for column in given], inds=part.numpy())
        train.finalize_features()
        judge = peer()  # 0.3.2 drops the CPU projection after finalize_features and only makes it anew for another id
        for i, model in enumerate(models):
            judge.start_scoring_checkpoint("board", model.state_dict(), model_id=i, num_targets=board.count)
            judge.score(batch=list(columns(board.queries)), num_samples=board.count)
        return np.array(judge.finalize_scores("board"), dtype=float)


def _language_modelling(board: Board) -> type:
    """It has no language model among its tasks: its documented way is a class of one's own."""
    from trak.modelout_functions import AbstractModelOutput

    class LanguageModelling(AbstractModelOutput):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, ids: Tensor) -> Tensor:
            return margins(nlls(board, lambda x: functional_call(model, (weights, buffers), (x,)), (ids[None],))).sum()

        def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
            with torch.no_grad():
                nll = nlls(board, lambda x: functional_call(model, (weights, buffers), (x,)), batch)
            return (1 - (-nll).exp()).mean(1, keepdim=True)

    return LanguageModelling


# ---- dattri


def _single(board: Board, model: nn.Module, weights: Any, sample: Any) -> Tensor:
    """(B, T) of a batch, or (1, T) of a sample without the batch's dimension."""
    flat = columns(board.queries)[0].ndim - 1
    given = tuple(c[None] for c in sample) if sample[0].ndim == flat else tuple(sample)
    return nlls(board, lambda x: functional_call(model, weights, (x,)), given)


def _loss_task(board: Board, models: list[nn.Module]) -> Any:
    from dattri.task import AttributionTask

    model = deepcopy(models[0])

    def loss(weights: Any, data: Any) -> Tensor:
        return _single(board, model, weights, data).mean()

    return AttributionTask(loss, model, [deepcopy(m.state_dict()) for m in models])


@entry("dattri TRAK", "peer", module="dattri")
def dattri_trak(board: Board) -> Array:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model, models = deepcopy(board.ensemble[0]), board.ensemble
    with quiet():
        task = AttributionTask(
            lambda weights, sample: margins(_single(board, model, weights, sample)).sum(),
            model,
            [deepcopy(m.state_dict()) for m in models],
        )
        peer = TRAKAttributor(
            task=task,
            correct_probability_func=lambda weights, sample: (-_single(board, model, weights, sample)).exp().mean(),
            projector_kwargs={"proj_dim": K, "device": "cpu"},
        )
        peer.cache(loader(board.pool))
        with torch.no_grad():
            return np.asarray(peer.attribute(loader(board.queries)).detach().double())


def _tracin(board: Board, models: list[nn.Module], weights: list[float], normalized: bool) -> Array:
    from dattri.algorithm.tracin import TracInAttributor

    with quiet():
        task = _loss_task(board, models)
        peer = TracInAttributor(task, torch.tensor(weights), normalized)  # sketched to 512 by its defaults
        return np.asarray(peer.attribute(loader(board.pool), loader(board.queries)).double())


@entry("dattri TracIn", "peer", module="dattri")
def dattri_tracin(board: Board) -> Array:
    return _tracin(board, [c.model for c in board.checkpoints], [c.rate for c in board.checkpoints], False)


@entry("dattri Grad-Dot", "peer", module="dattri")
def dattri_dot(board: Board) -> Array:
    return _tracin(board, [board.model], [1.0], False)


@entry("dattri Grad-Cos", "peer", module="dattri")
def dattri_cosine(board: Board) -> Array:
    return _tracin(board, [board.model], [1.0], True)


def _inverse(board: Board, name: str, **settings: Any) -> Array:
    import dattri.algorithm.influence_function as peers

    with quiet():
        peer = getattr(peers, name)(task=_loss_task(board, [board.model]), **settings)
        peer.cache(loader(board.pool))
        return np.asarray(peer.attribute(loader(board.pool), loader(board.queries)).detach().double())


@entry("dattri EK-FAC", "peer", module="dattri")
def dattri_ekfac(board: Board) -> Array:
    """Its default damping, 0, divides by eigenvalues that are 0; .1 is what its tests have. It takes linear layers
    only, of a network with convolutions the last."""
    if board.texts is not None:
        raise NotHere("0.3.0 takes inputs of layers with two dimensions only (_update_covariance)")
    return _inverse(board, "IFAttributorEKFAC", damping=0.1)


@entry("dattri CG, regularization 0.1", "peer", module="dattri")
def dattri_cg(board: Board) -> Array:
    if board.texts is not None:
        raise NotHere("products with the whole Hessian of every query take too long here")
    return _inverse(board, "IFAttributorCG", regularization=0.1)


@entry("dattri DataInf, regularization 1e-3", "peer", module="dattri")
def dattri_datainf(board: Board) -> Array:
    return _inverse(board, "IFAttributorDataInf", regularization=1e-3)


@entry("dattri KNN-Shapley", "peer", module="dattri")
def dattri_shapley(board: Board) -> Array:
    from dattri.algorithm.data_shapley import KNNShapleyAttributor

    if board.texts is not None:
        raise NotHere("a text has no class")
    pairs = [(last_hidden(board, batch), batch[1]) for batch in (board.pool, board.queries)]
    with quiet():
        found = KNNShapleyAttributor(k_neighbors=5).attribute(*(loader(pair) for pair in pairs))
    return np.asarray(found, dtype=np.float64).T  # (targets, rows), whatever its docstring says


# ---- kronfluence


def _kronfluence(board: Board, damping: float | None) -> Array:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Likelihood(Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            if not sample:
                return nlls(board, model, batch).mean(1).sum()
            logits, labels = logits_of(board, model, batch)
            with torch.no_grad():
                drawn = torch.multinomial(logits.detach().flatten(0, 1).softmax(-1), 1)[:, 0]
            each = nn.functional.cross_entropy(logits.flatten(0, 1), drawn, reduction="none")
            return each.view(labels.shape).mean(1).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return nlls(board, model, batch).mean(1).sum()

    task = Likelihood()
    with tempfile.TemporaryDirectory() as folder, quiet():
        model = prepare_model(deepcopy(board.model), task)
        peer = Analyzer("board", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        pool, queries = data_set(board.pool), data_set(board.queries)
        peer.fit_all_factors("ekfac", pool, per_device_batch_size=BATCH)
        peer.compute_pairwise_scores(
            "scores",
            "ekfac",
            queries,
            pool,
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return np.asarray(peer.load_pairwise_scores("scores")["all_modules"].double().T)


@entry("kronfluence EK-FAC", "peer", module="kronfluence")
def kronfluence_default(board: Board) -> Array:
    return _kronfluence(board, 1e-8)


@entry("kronfluence EK-FAC, damping .1 mean", "peer", module="kronfluence")
def kronfluence_mean(board: Board) -> Array:
    return _kronfluence(board, None)
