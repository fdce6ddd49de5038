"""Scores of a corpus of which everything that a stranger may choose is hostile."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.report.small_report import Column, make_scores

ROWS = 60
_RUNS = "window.planted=1"
MARKUP = f"<script>{_RUNS}</script><img src=http://evil.example/a onerror={_RUNS}><svg onload={_RUNS}>"
ACTING = "\x1b[2J\x07\x00\u202eback\u202c\u2066 =HYPERLINK('http://evil.example') </script></style>\"'`${planted=1}"
NAME = f"{MARKUP}{ACTING}"[-90:].replace("\0", "")  # no command line could hold it


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 10¹⁰ pixels."""
    size = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + size
    return data + struct.pack(">I", zlib.crc32(b"IHDR" + size)) + b"\0\0\0\0IDAT"


def hostile_scores(root: Path) -> Path:
    """Of images, of which some are none, with labels and sources."""
    rng = np.random.default_rng(0)
    written = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(written, "PNG")
    pictures = [written.getvalue(), bomb(), b"<svg onload='planted=1'>"]
    rows = {
        "id": [f"{MARKUP}{ACTING}{i}" for i in range(ROWS)],
        "image": [pictures[i % 3] for i in range(ROWS)],
        "label": [(MARKUP, ACTING, "\u202ecat", "a" * 150)[i % 4] for i in range(ROWS)],
        "source": [(ACTING, MARKUP, None)[i % 3] for i in range(ROWS)],
    }
    quality = rng.normal(size=ROWS).astype(np.float32)
    quality[7] = np.nan
    scores = {"quality": quality, f'"{NAME}\n': rng.integers(0, 5, ROWS), "constant": np.ones(ROWS)}
    scores["e_prediction"] = np.arange(ROWS) % 4
    columns = [Column(name, "low" if name.startswith('"') else "high", f"about {MARKUP}{ACTING}") for name in scores]
    task = {"kind": "classification", "image_column": "image", "label_column": "label"}
    recipe = {"methods": [{"method": "ensemble", "name": "e"}, {"method": MARKUP}]}
    why = [(1, f"bad {MARKUP}{ACTING} 17"), (2, "empty")]
    return make_scores(
        root, rows, scores, columns=columns, task=task, quarantined=why, recipe=recipe, name="a<b>&\u202e'.parquet"
    )
