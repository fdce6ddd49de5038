"""Rules for choosing towards targets: in turns over several, and with the weights of a robust objective."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.rules import Amount, Keep, amount_rows
from assay.select.selection import KEPT, UNSCORED, Selection, indices_mask, oriented


def round_robin(table: pa.Table, by: Sequence[str], amount: Amount, seed: int, keep: Keep | None = None) -> Selection:
    """Targets take turns: each takes the best row by its own score that no other has taken (2505.19051).

    Every round goes through the targets in a new random order, so that none always chooses first; the last round may
    end early. No target's scale matters. A row is a candidate for the targets that scored it.

    Args:
        table: with the columns ``by``.
        by: the targets' scores, each to be kept at its own end unless ``keep`` says which.
        amount: as in `top`.
        seed: of the orders.
    """
    if not by:
        raise ValueError("by: expected the names of the targets' scores, got none")
    scores = [oriented(table, name, keep) for name in by]
    wanted = amount_rows(amount, table.num_rows)
    queues = []
    for score in scores:
        candidates = np.flatnonzero(score.valid)
        queues.append(iter(candidates[np.argsort(-score.values[candidates], kind="stable")].tolist()))
    rng = np.random.Generator(np.random.Philox(seed))
    codes = np.where(np.any([score.valid for score in scores], 0), 0, UNSCORED).astype(np.int64)
    left = min(wanted, int((codes != UNSCORED).sum()))
    while left:
        for target in rng.permutation(len(by))[:left]:
            row = next((row for row in queues[target] if codes[row] == 0), None)
            if row is not None:
                codes[row] = UNSCORED + 1 + target
                left -= 1
    mask = codes > UNSCORED
    if len(by) > 250:  # the reasons are bytes
        codes[mask] = KEPT
    legend = (
        "dropped: taken by no target",
        "kept: taken by some target",
        "dropped: every score is NaN",
        *(f"kept: taken by {name}" for name in by[:250]),
    )
    rule = f"{', '.join(by)} in turns, {amount}, seed {seed}"
    return Selection(rule, mask, codes.astype(np.uint8), legend)


def in_turns(rankings: npt.NDArray[np.int64], amount: int, rows: int) -> Selection:
    """Queries take turns: each its next best row, and one that another has taken costs the turn (RDS+, 2503.01807).

    Args:
        rankings: (queries, k) rows' positions, best first, as ``FeatureStore.topk(queries, k, reduce="none")`` gives
            them. -1 stands for no row.
        amount: how many rows to keep.
        rows: of the table.

    Raises:
        ValueError: positions outside the table, or rankings too short to name ``amount`` rows.
    """
    ranked = np.asarray(rankings)
    integers = ranked.size == 0 or np.issubdtype(ranked.dtype, np.integer)
    if ranked.ndim != 2 or not integers or (ranked.size and not -1 <= ranked.min() <= ranked.max() < rows):
        raise ValueError(
            f"rankings: expected (queries, k) integers from -1 to {rows - 1}, the rows' positions, got {ranked.dtype} "
            f"of shape {ranked.shape}" + (f", {ranked.min()} to {ranked.max()}" if ranked.size else "")
        )
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 0:
        raise ValueError(f"amount={amount!r}: expected a number of rows of at least 0")
    in_order = ranked.T.ravel()
    named, first = np.unique(in_order[in_order >= 0], return_index=True)
    if len(named) < min(amount, rows):
        raise ValueError(
            f"amount={amount}: {ranked.shape[0]} rankings of {ranked.shape[1]} rows name {len(named)} in all; give "
            "longer ones (a larger k)"
        )
    mask = indices_mask(rows, named[np.argsort(first)[:amount]])
    legend = ("dropped: taken by no query", "kept: taken by a query in its turn")
    return Selection(f"{len(ranked)} queries in turns, {amount}", mask, mask.astype(np.uint8), legend)


def robust(table: pa.Table, by: str, amount: Amount, keep: Keep | None = None) -> Selection:
    """The best ``amount`` rows as in `top`, with weights w_i = [(p_i − μ)/λ]₊ that sum to their number (2505.19051).

    They maximise Σ w_i p_i − (λ/2)‖w‖² over w ≥ 0, Σ w_i = k, whose support is the k best rows for a range of λ. Taken
    is its largest, the most even weights that leave the other rows out: then μ is the score of the best row left out.
    Rows that tie with that one have weight 0 and are not kept.

    ``weights`` are not confined to [0, 1]. Where every scored row is kept, λ is infinite and all weights are 1.
    """
    score = oriented(table, by, keep)
    wanted = amount_rows(amount, table.num_rows)
    candidates = np.flatnonzero(score.valid)
    best_first = candidates[np.argsort(-score.values[candidates], kind="stable")]
    weights = np.zeros(table.num_rows)
    kept = best_first[:wanted]
    left_out = best_first[wanted : wanted + 1]
    if not len(left_out):
        weights[kept] = 1.0
    elif len(kept):
        worth = score.values.astype(np.float64)
        excess = worth[kept] - worth[left_out]
        kept, excess = kept[excess > 0], excess[excess > 0]
        if len(kept) and not np.isfinite(excess).all():
            raise ValueError(f"by={by!r}: among the best {wanted} are infinite scores, which have no finite weights")
        weights[kept] = excess / excess.sum() * len(kept) if len(kept) else 0.0
    limit = score.sign * float(score.values[kept].min()) if len(kept) else None
    mask = np.zeros(table.num_rows, bool)
    mask[kept] = True
    place = f"among the {wanted:,} {score.end} of {by}"
    return score.select(
        mask,
        f"{by}, {score.end} {amount} with robust weights",
        place,
        f"not {place}",
        threshold=limit,
        weights=weights,
    )
