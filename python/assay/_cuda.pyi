import collections.abc
import typing

def build_info() -> str: ...
def compute_capability() -> int: ...
def ensemble(
    logits: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    row_strides: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    col_strides: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    dtype: typing.SupportsInt | typing.SupportsIndex,
    N: typing.SupportsInt | typing.SupportsIndex,
    C: typing.SupportsInt | typing.SupportsIndex,
    labels: typing.SupportsInt | typing.SupportsIndex,
    ignore_index: typing.SupportsInt | typing.SupportsIndex,
    weights: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
    fields: typing.SupportsInt | typing.SupportsIndex,
    out: typing.SupportsInt | typing.SupportsIndex,
    prediction: typing.SupportsInt | typing.SupportsIndex,
    allocate: collections.abc.Callable[[int], typing.SupportsInt | typing.SupportsIndex],
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def sparse(
    vectors: typing.SupportsInt | typing.SupportsIndex,
    dtype: typing.SupportsInt | typing.SupportsIndex,
    rows: typing.SupportsInt | typing.SupportsIndex,
    stride: typing.SupportsInt | typing.SupportsIndex,
    count: typing.SupportsInt | typing.SupportsIndex,
    order: typing.SupportsInt | typing.SupportsIndex,
    dim: typing.SupportsInt | typing.SupportsIndex,
    nonzeros: typing.SupportsInt | typing.SupportsIndex,
    slice: typing.SupportsInt | typing.SupportsIndex,
    slices_of_piece: typing.SupportsInt | typing.SupportsIndex,
    partial: typing.SupportsInt | typing.SupportsIndex,
    sums: typing.SupportsInt | typing.SupportsIndex,
    stream: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def sparse_chunk(
    dim: typing.SupportsInt | typing.SupportsIndex,
    nonzeros: typing.SupportsInt | typing.SupportsIndex,
    dtype: typing.SupportsInt | typing.SupportsIndex,
    one_row: bool,
) -> int: ...
