"""Which files hold media, by their suffixes; what is in them is nobody's business here."""

from __future__ import annotations

IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".pbm", ".pgm", ".ppm", ".pnm")
SOUNDS = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
VIDEOS = (".mp4", ".webm", ".mkv", ".mov", ".avi")

_KINDS = {suffix: kind for kind, of in (("image", IMAGES), ("audio", SOUNDS), ("video", VIDEOS)) for suffix in of}


def media_type(suffix: str) -> str:
    """`image`, `audio`, `video`, or `binary`: the type that `ColumnFacts` gives to the bytes of such a file."""
    return _KINDS.get(suffix.lower(), "binary")
