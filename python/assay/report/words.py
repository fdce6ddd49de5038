"""Numbers and names as the page has them."""

from __future__ import annotations

import numpy as np

_MOST = 200


def in_digits(value: float) -> str:
    """As few digits as tell a float32 from all others: what is copied from the page cuts where the page says."""
    return str(np.float32(value))


def short(text: str) -> str:
    """A name, its beginning if it is long."""
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


def percent(share: float) -> str:
    """A share in whole per cent."""
    return f"{100 * share:.0f} %"


def rows_of(count: int) -> str:
    """So many rows."""
    return f"{count:,} row{'' if count == 1 else 's'}"
