"""Calls of libraries that read strangers' files: what they print and raise stays within bounds."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registration

from assay.recipe.errors import EngineError
from assay.recipe.model_files import one_line

log = logging.getLogger("assay")

_LOUD = ("transformers", "huggingface_hub", "peft", "accelerate", "gguf")


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises becomes an EngineError of one line that begins with ``what``."""
    try:
        yield
    except (EngineError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        raise EngineError(f"{what} ({one_line(error)})") from error


class _ToOwnLog(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        log.debug("%s: %s", record.name, record.getMessage()[:2000])


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries print, log and warn of goes to assay's own log, at its lowest level. They reach no network either:
    a config may name what it wants fetched."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    bars: Any = sys.modules.get("transformers.utils.logging")  # if nothing has imported it, there are none
    shown = bars is not None and bars.is_progress_bar_enabled()
    hub: Any = sys.modules.get("huggingface_hub.constants")
    online = hub is not None and not hub.HF_HUB_OFFLINE
    printed = io.StringIO()
    if online:
        hub.HF_HUB_OFFLINE = True
    if shown:
        bars.disable_progress_bar()
    try:
        for logger in loggers:
            logger.handlers, logger.propagate = [_ToOwnLog()], False
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        if shown:
            bars.enable_progress_bar()
        if online:
            hub.HF_HUB_OFFLINE = False
        _log_lines(printed.getvalue())


@contextlib.contextmanager
def native_quietly() -> Iterator[None]:
    """The same for what native code writes to file descriptor 2, as a panic of Rust code does."""
    try:
        saved = os.dup(2)
    except OSError:  # closed: then nobody sees it anyway
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            _log_lines(file.read(10_000).decode("utf-8", "replace"))


def _log_lines(text: str) -> None:
    for line in text[:10_000].splitlines():
        log.debug("%s", line)


@contextlib.contextmanager
def bounded_memory(headroom: int) -> Iterator[None]:
    """While it lasts, the process may take so many more bytes of address space: what wants more is a MemoryError.

    For calls of a fraction of a millisecond, since it holds for all threads: see `memory_limits`. One at a time, for
    each ends with what it found. Without such limits it does nothing.
    """
    with _LIMITED.lock:
        _LIMITED.changes += 1
        try:
            with _limited(headroom):
                yield
        finally:
            _LIMITED.changes += 1


@dataclass
class _Limited:
    lock: threading.Lock
    changes: int = 0


_LIMITED = _Limited(threading.Lock())


def memory_limits() -> int:
    """How often `bounded_memory` has begun or ended: an odd number while it lasts. Memory that ran out while the number
    changed, or is odd, may not have run out at all."""
    return _LIMITED.changes


@contextlib.contextmanager
def unbounded_memory() -> Iterator[None]:
    """While it lasts, no thread bounds the process's memory; those that want to wait."""
    with _LIMITED.lock:
        yield


@contextlib.contextmanager
def _limited(headroom: int) -> Iterator[None]:
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = [limit for limit in (used + headroom, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass
class Budget:
    """How much a model may consist of, given what its weights' headers say.

    While the context lasts, a module, parameter or buffer beyond it is an EngineError: a config of a billion layers
    ends after a few of them.
    """

    path: str
    tensors: int
    numbers: int

    def __post_init__(self) -> None:
        self._modules = 0
        self._parameters = 0
        self._numbers = 0
        self._buffers = 0

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        thread = threading.get_ident()

        def own(check: Any) -> Any:
            return lambda module, name, value: check(value) if threading.get_ident() == thread else None

        handles = [
            registration.register_module_module_registration_hook(own(self._add_module)),
            registration.register_module_parameter_registration_hook(own(self._add_parameter)),
            registration.register_module_buffer_registration_hook(own(self._add_buffer)),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_module(self, module: nn.Module | None) -> None:
        self._modules += 1
        self._check("modules", self._modules, 50 * self.tensors + 10_000)

    def _add_parameter(self, parameter: Tensor | None) -> None:
        if parameter is None:
            return
        self._parameters += 1
        self._check("parameters", self._parameters, 4 * self.tensors + 1_000)
        self._numbers += parameter.numel()
        # Twice for a tied head, and some for what turns out to be missing: that is named later.
        self._check("numbers", self._numbers, 4 * self.numbers + 10_000_000)

    def _add_buffer(self, buffer: Tensor | None) -> None:
        if buffer is not None:
            self._buffers += buffer.numel() * buffer.element_size()
            self._check("bytes of buffers", self._buffers, 8 * self.numbers + (2 << 30))

    def _check(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise EngineError(
                f"{self.path}: describes a model of over {limit:,} {what}, but the weights hold {self.tensors:,} "
                f"tensors of {self.numbers:,} numbers"
            )
