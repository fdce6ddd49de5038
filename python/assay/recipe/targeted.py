"""The recipe's target-aware methods: they look at targets, and at a sample of the pool, before they score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import nn

from assay.methods.base import Method
from assay.methods.influence import Influence
from assay.methods.targets import Targets
from assay.ops import Kronecker, Mask, Rademacher, Sketch, Sparse
from assay.recipe.methods import METHODS, MethodSpec
from assay.recipe.models import file_sha256
from assay.recipe.parts import ExistingPath, Part, Registry
from assay.tasks import Task

# Second moments are held in double: this much of them at most. Factoring one takes as much again.
MOMENT_BYTES = 8 << 30

Size = Annotated[int, Field(ge=1)]


class SketchSpec(Part):
    """A random projection."""

    kind: str

    def build(self, seed: int) -> Sketch:
        raise NotImplementedError


SKETCHES: Registry[SketchSpec] = Registry("kind")
SketchField = Annotated[SerializeAsAny[SketchSpec], BeforeValidator(SKETCHES.parse)]


@SKETCHES.add("kronecker")
class KroneckerSpec(SketchSpec):
    kind: Literal["kronecker"]
    rows: Size
    cols: Size

    def build(self, seed: int) -> Sketch:
        return Kronecker(self.rows, self.cols, seed)


@SKETCHES.add("sparse")
class SparseSpec(SketchSpec):
    kind: Literal["sparse"]
    dim: Size
    nonzeros: Size = 1

    def build(self, seed: int) -> Sketch:
        return Sparse(self.dim, self.nonzeros, seed)


@SKETCHES.add("rademacher")
class RademacherSpec(SketchSpec):
    kind: Literal["rademacher"]
    dim: Size

    def build(self, seed: int) -> Sketch:
        return Rademacher(self.dim, seed)


@SKETCHES.add("mask")
class MaskSpec(SketchSpec):
    kind: Literal["mask"]
    rows: Size
    cols: Size
    then: SketchField | None = None

    def build(self, seed: int) -> Sketch:
        then = None if self.then is None else self.then.build(seed)
        if isinstance(then, Mask):
            raise ValueError("sketch.then: a mask of a mask; expected kronecker, sparse or rademacher")
        return Mask(self.rows, self.cols, then, seed)


class TargetedSpec(MethodSpec):
    """A method that is fitted to targets. ``build_fitted`` takes the place of ``build``."""

    targets: list[str] | None = None
    layers: str | list[str] | None = None
    skip_unsupported: bool = False
    wants_pool: ClassVar[bool] = True
    """Whether ``fit`` looks at the pool's sample, so that scores depend on it."""

    def targets_of(self, known: Iterable[str]) -> list[str]:
        """The targets it is about: all that the recipe has, unless it names some."""
        return list(known) if self.targets is None else self.targets

    def without_targets(self) -> bool:
        """Whether there is something to score without any target."""
        return False

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        """Make the method, not fitted yet."""
        raise NotImplementedError

    def common(self) -> dict[str, Any]:
        """The options that all of them have."""
        return {"layers": self.layers, "skip_unsupported": self.skip_unsupported}


class CheckpointsSpec(TargetedSpec):
    """A method over several checkpoints and a sketch."""

    models: Annotated[list[str], Field(min_length=1)]
    sketch: SketchField | None = None
    keep_features: Literal["float32", "float16", "bfloat16", "int8"] | None = None
    """Store the corpus's features as this, and score what is stored: new targets need no new pass over the corpus."""

    def identity(self) -> dict[str, Any]:
        # Rounding changes scores. A recipe that keeps nothing has the identity that it had before there was the key.
        return {k: v for k, v in super().identity().items() if k != "keep_features" or v is not None}

    def features_identity(self, k: int) -> dict[str, Any]:
        """The parameters that checkpoint k's features of the corpus depend on."""
        later = ("models", "targets", "damping", "target_share", "weights", "name", "keep_features")
        return {key: value for key, value in self.identity().items() if key not in later}

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        return {("models", i): name for i, name in enumerate(self.models)}

    def given(self, seed: int, **options: Any) -> dict[str, Any]:
        """The options as the methods take them; a sketch or a damping that is None is the method's own default."""
        sketch = None if self.sketch is None else self.sketch.build(seed)
        return {**self.common(), **{k: v for k, v in (options | {"sketch": sketch}).items() if v is not None}}

    def checkpoints(self, models: Mapping[str, nn.Module]) -> list[nn.Module]:
        return [models[name] for name in self.models]


@METHODS.add("trak")
class TRAKSpec(CheckpointsSpec):
    """`assay.methods.TRAK`."""

    method: Literal["trak"]
    damping: Annotated[float, Field(ge=0)] | None = None
    name: str = "trak"

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import TRAK

        options = self.given(seed, damping=self.damping, name=self.name)
        return _of_size(TRAK(self.checkpoints(models), task, targets, **options))


@METHODS.add("dsdm")
class DsDmSpec(CheckpointsSpec):
    """`assay.methods.DsDm`."""

    method: Literal["dsdm"]
    damping: Annotated[float, Field(ge=0)] | None = None
    name: str = "dsdm"

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import DsDm

        options = self.given(seed, damping=self.damping, name=self.name)
        return _of_size(DsDm(self.checkpoints(models), task, targets, **options))


@METHODS.add("logra")
class LoGraSpec(CheckpointsSpec):
    """`assay.methods.LoGra`; with a mask as its sketch, GraSS."""

    method: Literal["logra"]
    damping: Annotated[float, Field(ge=0)] | None = None
    name: str = "logra"

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import LoGra

        options = self.given(seed, damping=self.damping, name=self.name)
        return _of_size(LoGra(self.checkpoints(models), task, targets, **options))


@METHODS.add("trackstar")
class TrackStarSpec(CheckpointsSpec):
    """`assay.methods.TrackStar`."""

    method: Literal["trackstar"]
    damping: Annotated[float, Field(ge=0)] | None = None
    target_share: Annotated[float, Field(ge=0, le=1)] | None = None
    name: str = "trackstar"

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import TrackStar

        options = self.given(seed, damping=self.damping, target_share=self.target_share, name=self.name)
        return _of_size(TrackStar(self.checkpoints(models), task, targets, **options))


@METHODS.add("less")
class LESSSpec(CheckpointsSpec):
    """`assay.methods.LESS`. ``optimizers``: one file per checkpoint, or null for plain gradients."""

    method: Literal["less"]
    optimizers: list[ExistingPath] | None
    weights: list[float] | None = None
    eps: Literal["outside", "inside"] = "outside"
    name: str = "less"
    wants_pool: ClassVar[bool] = False

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import LESS, AdamState

        states = None if self.optimizers is None else [AdamState.load(path) for path in self.optimizers]
        options = self.given(seed, name=self.name, weights=self.weights, eps=self.eps)
        return LESS(self.checkpoints(models), task, targets, optimizers=states, **options)

    def identity(self) -> dict[str, Any]:
        files = None if self.optimizers is None else [f"sha256:{file_sha256(path)}" for path in self.optimizers]
        return super().identity() | {"optimizers": files}

    def features_identity(self, k: int) -> dict[str, Any]:
        files = self.identity()["optimizers"]
        return super().features_identity(k) | {"optimizers": None if files is None else files[k]}


@METHODS.add("ekfac")
class EKFACSpec(TargetedSpec):
    """`assay.methods.EKFAC`. With ``self_influence`` it works without targets (``targets: []``) too."""

    method: Literal["ekfac"]
    model: str
    self_influence: bool = False
    damping: Annotated[float, Field(ge=0)] = 0.1
    true_fisher: bool = True
    name: str = "ekfac"

    def without_targets(self) -> bool:
        return self.self_influence

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        return {("model",): self.model}

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import EKFAC

        return EKFAC(
            models[self.model],
            task,
            targets,
            self_influence=self.self_influence,
            damping=self.damping,
            true_fisher=self.true_fisher,
            name=self.name,
            **self.common(),
        )


@METHODS.add("influence_distillation")
class InfluenceDistillationSpec(TargetedSpec):
    """`assay.methods.InfluenceDistillation`. Its landmarks are drawn from ``fit.samples``."""

    method: Literal["influence_distillation"]
    model: str
    landmarks: Annotated[int, Field(ge=2)] = 4096
    tangents: Size = 2
    embed_layers: str | list[str] | None = None
    at: str | None = None
    embed_sketch: SketchField | None = None
    kernel: Literal["rbf", "linear"] = "rbf"
    damping: Annotated[float, Field(ge=0)] = 0.01
    sketch: SketchField | None = None
    optimizer: ExistingPath | None = None
    name: str = "influence_distillation"

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        return {("model",): self.model}

    def build_fitted(self, models: Mapping[str, nn.Module], task: Task, seed: int, targets: Targets) -> Method:
        from assay.methods import AdamState, InfluenceDistillation

        return InfluenceDistillation(
            models[self.model],
            task,
            targets,
            landmarks=self.landmarks,
            tangents=self.tangents,
            embed_layers=self.embed_layers,
            at=self.at,
            embed_sketch=None if self.embed_sketch is None else self.embed_sketch.build(seed),
            kernel=self.kernel,
            damping=self.damping,
            sketch=None if self.sketch is None else self.sketch.build(seed),
            optimizer=None if self.optimizer is None else AdamState.load(self.optimizer),
            seed=seed,
            name=self.name,
            **self.common(),
        )

    def identity(self) -> dict[str, Any]:
        file = None if self.optimizer is None else f"sha256:{file_sha256(self.optimizer)}"
        return super().identity() | {"optimizer": file}


def _of_size(method: Influence) -> Influence:
    """The method, if the second moments of its features fit into memory."""
    feature = method.feature(0, target=False)
    widths: Sequence[int] = [feature.size]
    if method.kernel.blocks and not method.together:
        places = [feature.place(name) for name in method.parameters]
        widths = [place.stop - place.start for place in places]
    needed = 8 * len(method.models) * sum(width**2 for width in widths)
    if needed > MOMENT_BYTES:
        raise ValueError(
            f"{method.name}: {method.sketch} gives features of {feature.size:,} numbers, whose second moments take "
            f"{needed / 2**30:,.0f} GiB, more than {MOMENT_BYTES / 2**30:g} GiB; take a smaller sketch"
        )
    return method
