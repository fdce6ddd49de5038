"""The fields of ``assay.ops.EnsembleStats`` in the order of csrc/assay.h: what a kernel's bits and rows stand for."""

FIELDS = (
    "nll",
    "mean_nll",
    "margin",
    "agreement",
    "el2n",
    "entropy",
    "expected_entropy",
    "mutual_information",
    "confidence",
    "vote_entropy",
    "prediction",
)
LABEL_FIELDS = frozenset(FIELDS[:5])  # without labels they are NaN
MIXTURE_FIELDS = frozenset({"margin", "el2n", "entropy", "mutual_information", "confidence", "prediction"})


def has(fields: int, *names: str) -> bool:
    """Whether a mask of fields, bit f for field f, has any of these."""
    return any(fields >> FIELDS.index(name) & 1 for name in names)
