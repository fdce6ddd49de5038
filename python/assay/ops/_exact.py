"""An op's products have the precision that the op promises, whatever its caller allows for their own.

Callers allow less in two ways: autocast, which is a thread's own, and torch's settings for float32 products (TF32 on a
GPU, bfloat16 in oneDNN), which are the process's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

# The backends whose float32 products torch can be told to round; ops have no convolutions.
_ROUNDED = ("cuda", "mkldnn")
_PRECISE = ("ieee", "none")
# torch 2.9 gave each backend a setting of its own; before it, and still beside them, there is one for all.
_each = hasattr(torch._C, "_get_fp32_precision_getter")


@contextmanager
def exact() -> Iterator[None]:
    """Without the caller's autocast and TF32."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32)
        yield


@dataclass
class _Float32:
    """While any thread is inside, float32 products are float32's; what the last one out restores is what was found."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    general: str | None = None  # torch.get_float32_matmul_precision, where it was not the highest
    own: dict[str, str] = field(default_factory=dict)  # the backends' settings, if any was not precise

    def __enter__(self) -> None:
        with self.lock:  # in every thread: another may have allowed TF32 since the first one came
            self._raise()
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self._restore()

    def _raise(self) -> None:
        found = {name: _get(name) for name in _ROUNDED} if _each else {}
        own = {name: value for name, value in found.items() if value not in _PRECISE}
        if _each and not own:
            return
        if not self.own:
            self.own = {name: _inherited(name, value) for name, value in found.items()}
        self.own |= {name: _inherited(name, value) for name, value in own.items()}
        general = _general()
        if general not in (None, "highest"):
            self.general = general
            torch.set_float32_matmul_precision("highest")  # torch refuses to multiply where the two disagree
        for name in own:
            _set(name, "ieee")

    def _restore(self) -> None:
        if self.general is not None:  # sets the backends' too, which are put right below
            torch.set_float32_matmul_precision(self.general)
        for name, value in self.own.items():
            _set(name, value)
        self.general, self.own = None, {}


_float32 = _Float32()


def _get(backend: str, op: str = "matmul") -> str:
    value: str = torch._C._get_fp32_precision_getter(backend, op)
    return value


def _set(backend: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", value)


def _inherited(backend: str, value: str) -> str:
    """What to set for ``value`` to be what is found again: nothing, where it comes from the backend's setting."""
    return "none" if _get(backend, "all") == value else value


def _general() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's answer where the backends' settings are not what it would have set
        return None
