"""bergson on the text board. It takes language models of transformers only: the board's is wrapped as one."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.quality.leaderboard.board import Board, NotHere
from benchmarks.quality.leaderboard.entries import entry
from benchmarks.quality.leaderboard.peers import BATCH, quiet

Array = NDArray[np.float64]


def _wrapped(board: Board) -> Any:
    if board.texts is None:
        raise NotHere("it takes language models of transformers only")
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Wrapped(PreTrainedModel):  # type: ignore[misc]
        config_class = PretrainedConfig
        base_model_prefix = "inner"

        def __init__(self, config: Any, inner: nn.Module) -> None:
            super().__init__(config)
            self.inner = inner

        def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=self.inner(input_ids))

    return Wrapped(PretrainedConfig(), deepcopy(board.model))


def _collected(model: Any, ids: Tensor, dim: int, moments: bool) -> Any:
    """Gradients by layer, of the linear layers, and their second moments if these are wanted."""
    from bergson import GradientProcessor, InMemoryCollector
    from bergson.collector.collector import CollectorComputer
    from bergson.config import IndexConfig
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(run_path=f"{folder}/run", projection_dim=dim, loss_reduction="mean")
        config.partial_run_path.mkdir()
        data = Dataset.from_dict({"input_ids": ids.tolist(), "length": [ids.shape[1]] * len(ids)})
        collector = InMemoryCollector(
            model=model.inner,
            data=data,
            cfg=config,
            processor=GradientProcessor(projection_dim=dim),
            skip_hessians=not moments,
        )
        batches = [rows.tolist() for rows in torch.arange(len(ids)).split(BATCH)]
        computer = CollectorComputer(model=model, data=data, collector=collector, batches=batches, cfg=config)
        computer.run_with_collector_hooks()
        return collector


def _cosines(pool: dict[str, Tensor], queries: dict[str, Tensor]) -> Array:
    left, right = (nn.functional.normalize(torch.cat([side[n] for n in pool], 1).float()) for side in (pool, queries))
    return (left @ right.T).double().numpy()


@entry("bergson gradient cosine", "peer", module="bergson")
def cosine(board: Board) -> Array:
    model = _wrapped(board)
    model.inner.device = torch.device("cpu")
    with quiet():
        pool, queries = (_collected(model, b["input_ids"], 0, False) for b in (board.pool, board.queries))
        return _cosines(pool.gradients, queries.gradients)


@entry("bergson TrackStar", "peer", module="bergson")
def trackstar(board: Board) -> Array:
    """16 × 16 a layer, moments of pool and queries mixed by its rule, H^(−1/2) on both sides: its defaults."""
    from bergson.hessians.preconditioner import DensePreconditioner
    from bergson.utils.math import compute_lambda

    model = _wrapped(board)
    model.inner.device = torch.device("cpu")
    with quiet():
        pool, queries = (_collected(model, b["input_ids"], 16, True) for b in (board.pool, board.queries))
        mine, theirs = pool.processor, queries.processor
        share = compute_lambda(query_eigen=theirs.hessians_eigen, index_eigen=mine.hessians_eigen)
        mixed = {n: share * theirs.hessians[n] + (1 - share) * h for n, h in mine.hessians.items()}
        whitened = DensePreconditioner.from_processor(replace(mine, hessians=mixed, hessians_eigen={}), power=-0.5)
        return _cosines(whitened.apply(pool.gradients), whitened.apply(queries.gradients))
