"""An op's float32 products are float32's, whatever precision the process allows for its own; and that is its again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

import assay
from assay import ops
from assay.ops import _head_backends
from assay.ops._exact import exact
from tests.precision import NEEDS_SETTINGS, WAYS, allow, restore, state

pytestmark = NEEDS_SETTINGS


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    restore()


@pytest.mark.parametrize("way", WAYS)
def test_exact_inside_and_the_callers_again_after(way: str) -> None:
    allow(way)
    before = state()
    assert "tf32" in before
    with exact():
        assert set(state()) <= {"ieee", "none"}
        if way != "every backend":  # there torch refuses to say
            assert not torch.backends.cuda.matmul.allow_tf32
    assert state() == before
    with pytest.raises(ZeroDivisionError), exact():
        raise ZeroDivisionError
    assert state() == before


def test_what_was_inherited_still_is() -> None:
    allow("every backend")
    with exact():
        pass
    torch.backends.fp32_precision = "ieee"
    assert set(state()) == {"ieee"}


def test_the_last_thread_out_restores() -> None:
    allow("in general")
    before = state()
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with exact():
            inside.set()
            leave.wait(10)
            seen.append(state())

    thread = threading.Thread(target=other)
    with ExitStack() as first:
        first.enter_context(exact())
        thread.start()
        assert inside.wait(10)
    assert set(state()) == {"ieee"}  # the first is out, the other still multiplies
    leave.set()
    thread.join(10)
    assert set(seen[0]) == {"ieee"}
    assert state() == before


@pytest.mark.parametrize("compiled", [False, True])
def test_the_body_of_an_op_multiplies_exactly(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = _head_backends._logits
    monkeypatch.setattr(_head_backends, "_logits", lambda *a: (seen.append(state()), plain(*a))[1])
    allow("in general")
    before = state()
    sketch = assay.Kronecker(2, 2)
    h, w, y = torch.randn(4, 8), torch.randn(5, 8), torch.randint(5, (4,))

    def run(h: torch.Tensor) -> torch.Tensor:
        return ops.head_scores(h, w, y, sketch=sketch).grad_sqnorm

    with assay.backend("reference"):
        (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(h)
    assert seen
    assert set(seen[-1]) == {"ieee"}
    assert state() == before
