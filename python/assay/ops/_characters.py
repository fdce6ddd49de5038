"""What a character is to the tokeniser: part of a word, a mark, a word by itself, or nothing; and its lower case.

Unicode 14.0's, whatever version Python has, so that a hash is the same everywhere. A code point without a meaning there
is what the one before it is.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from numpy.typing import NDArray

SPACE, WORD, MARK, ALONE = range(4)
"""Blanks, controls and formats (categories Z and C); letters, digits and what combines with them (L, N, M), and "_";
punctuation and symbols (P, S); ideographs and hiragana, which are written without blanks."""

_POINTS = 0x110000

# Where each run of one class begins, as the distance from the beginning of the one before it, in base 36 behind the
# class's letter.
_CLASSES = (
    "S0MxWfMaW7MqW4M1W1MqS4MyW9M1S2M1W4M2W1M1W3M2W1M3W1MnW1MvW1McqW4McWeM5W7M1W1M1WhM39W1M8W1M5W2M1W1M32W1M3vW1M5zW6M"
    "15W8M19W1M1W1M2W1M2W1M18SdM6WaMbS1M1W3M22W4M2uW1S8M1W1MaW1MjW2M1SfW1M6eW4M4W2M1cWgMuW2M14W1S7W8S22W1M3lW2MaW1M3l"
    "W2M6W2M1W1M3cWbM33W9M3bW1M3mWdM3bW1M7W1M4W1M5mW5M11W1M3eWdM1qW1MfW1MaW13M3kWnM2W6MkW1M1W1M1W1M1W4M1zW1M1kW8M1W1l"
    "M22W6M26W2M2jW1Mh0W9M13WgM2oW1Mh8W2ShW1MqW5M23W3M1zWbM44W3M1W4M10WbS3W1M8hW6M48WyMuW2M3kW7M1W8M4qWhM9WcM3gW4M1nW"
    "5M1qW2M1sWgM3W1MkpW1M1W3MbW3MdW3MdW5MbS3MgSoM8S1bWhMaW5MbW6MgW1cM1cW2M1W4M1W2MaW1M1W3M5W6M1W1M1W1M1W1M4W1MbW2M4W"
    "5M5W4M1W1M1mWk6M1oW26MmWhiMuWvgM6dW6MeW4M1W2M34WfM3lW1bM1ScwM1W4M3WpMfW1M5W2M5A4W2gM2W2M3W1M2iW1M44W2M4WaMwW1cMg"
    "WwMaWuM8W1MfWwMaW13MfA8wM534A1sWg74MwgW1sM1aW2M7hW3M2rW1MaW1M37W11M9W2M2vW2M4dW4MaWaM1gWcM26W2M14W3M1W1M1dW2M1bW"
    "1M2pWeMfW2M3gW4MnW3M2sW2MgW2M2xW1MeW6M3fW1S8pgA6ioWe8M15W1M3sWxMa3WiM3jWxMcW4MgWgMgW1sS3zM2WfMaW7MqW6MqWbM3eSpM3"
    "W4M74W7M1cW9M1lWhM2W35MbmW1M1cW1MbiW1MknW1MvW2M4mW1MvW1tM5sWgMvW1M20W1M13WgM1lW7M2hWgMlgW3M4lWrMmW16M47WbM2xS2M1"
    "W4SbW3M34W4M1cW2M27W4M4W1MdW1M1W4M2fW6M2zW7MbfW5MaW4M2wW1M6yWnM2xW3MsWwM1lW7M3gW4M6zW2tM4kWcM42W1M2kW8M2bW3M1WiM"
    "b5WfMwW2MhxW55M11W17MvkWgM29dWfStsW34gM7laW2M3pWbM1jW9M4WcMnbW2xM6aW1Mf5lW1M2S1W3moM28WetM5W3S6W8M8W2M7WuM4W44M3"
    "W4bMwW2oMo1W1MpW1MvW1MpW1MvW1MpW1MvW1MpW1MvW1MpW1M1oWe8M1jW4M1eW8M1WeM1WmM1boW8xM33WypMamWlvM1nW1M3W1M3hW1MchWeo"
    "MdW25fAswSgutdW73S1edc"
)

# Runs of characters with a lower case of their own: distance from the run before, step (. 1, : 2), how many, and how
# far away it is.
_LOWER = (
    "1t.q+w 3j.n+w o.7+w 14:o+1 1c.1-5j 2:3+1 7:8+1 h:n+1 1a.1-3d 1:3+1 8.1+5u 1:2+1 4.1+5q 1.1+1 2.2+5p 2.1+1 "
    "3.1+27 1.1+5m 1.1+5n 1.1+1 2.1+5p 1.1+5r 2.1+5v 1.1+5t 1.1+1 4.1+5v 1.1+5x 2.1+5y 1:3+1 6.1+62 1.1+1 2.1+62 "
    "3.1+1 2.1+62 1.1+1 2.2+61 2:2+1 4.1+63 1.1+1 4.1+1 8.1+2 1.1+1 2.1+2 1.1+1 2.1+2 1:9+1 j:9+1 j.1+2 1:2+1 4.1-2p "
    "1.1-1k 1:k+1 14.1-3m 2:9+1 o.1+8bv 1.1+1 2.1-4j 1.1+8bs 3.1+1 2.1-5f 1.1+1x 1.1+1z 1:5+1 8a:2+1 6.1+1 9.1+38 "
    "7.1+12 2.3+11 4.1+1s 2.2+1r 3.h+w i.9+w 18.1+8 9:c+1 s.1-1o 3.1+1 2.1-7 1.1+1 3.3-3m 3.g+28 g.w+w 28:h+1 16:r+1 "
    "1i.1+f 1:7+1 f:1c+1 2p.12+1c 29b.12+5ls 13.1+5ls 6.1+5ls k3.28+tzk 28.6+8 1pc.17-2bk 19.3-2bk 8z:23+1 4e.1-5vj "
    "2:1c+1 2w.8-8 g.6-8 g.8-8 g.8-8 g.6-8 h:4-8 f.8-8 w.8-8 g.8-8 g.8-8 g.2-8 2.2-22 2.1-9 c.4-2e 4.1-9 c.2-8 "
    "2.2-2s e.2-8 2.2-34 2.1-7 c.2-3k 2.2-3i 2.1-9 8a.1-5st 4.1-6gv 1.1-6di 7.1+s 1a.g+g z.1+1 mr.q+q 1fu.1c+1c "
    "2o.1+1 2.1-8af 1.1-2xy 1.1-89z 3:3+1 6.1-8bg 1.1-8al 1.1-8bj 1.1-8bi 2.1+1 3.1+1 9.2-8cf 2:1e+1 2z:2+1 7.1+1 "
    "nym:n+1 1s:e+1 4i:7+1 g:v+1 1z:2+1 4.1-r9g 1:5+1 d.1+1 2.1-wmg 3:2+1 6:a+1 k.1-wn8 1.1-wnj 1.1-wnf 1.1-wn5 "
    "1.1-wn8 2.1-wlu 1.1-wmi 1.1-wlx 1.1+ps 1:8+1 g.1-1c 1.1-wn7 1.1-raw 1:2+1 9.1+1 6:2+1 v.1+1 h7w.q+w yn.14+14 "
    "4w.10+14 5c.b+13 c.f+13 g.7+13 8.2+13 1d8.1f+1s 2e8.w+w gww.w+w o8w.y+y"
)


@functools.cache
def characters() -> NDArray[np.uint32]:
    """(0x110000,): by code point its class, in the upper 8 bits, and its lower case."""
    classes = np.zeros(_POINTS, np.uint32)
    start = 0
    for letter, distance in re.findall("([SWMA])([0-9a-z]+)", _CLASSES):
        start += int(distance, 36)
        classes[start:] = "SWMA".index(letter)
    lower = np.arange(_POINTS, dtype=np.int64)
    start = 0
    for distance, step, count, sign, shift in re.findall("(\\w+)([.:])(\\w+)([+-])(\\w+)", _LOWER):
        start += int(distance, 36)
        own = slice(start, start + int(count, 36) * (1 if step == "." else 2), 1 if step == "." else 2)
        lower[own] += int(sign + shift, 36)
    table: NDArray[np.uint32] = (classes << np.uint32(24)) | lower.astype(np.uint32)
    table.flags.writeable = False
    return table
