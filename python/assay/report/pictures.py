"""Images of a corpus as thumbnails that we made ourselves: not a byte of a stranger's file gets into the page."""

from __future__ import annotations

import base64
import io
from typing import Any

from assay.corpus.images import Beside, ImageLimits, decode_image

SIDE = 192


def thumbnail(name: str, value: Any, limits: ImageLimits, beside: Beside) -> str:
    """A value of an image column as a data URI: a JPEG of at most 192 pixels a side, decoded within ``limits``.

    Raises:
        BadRow: it is no image, or too large a one.
        ShardError: it is a path to a file that cannot be read now.
        ImportError: without Pillow.
    """
    image = decode_image(name, value, limits, beside)
    image.thumbnail((SIDE, SIDE))
    image.info.clear()  # a JPEG's comment would be written again
    written = io.BytesIO()
    image.save(written, format="JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"
