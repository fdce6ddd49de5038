"""Which parameters a pattern selects, and which layers must be tapped for their exact gradients."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from assay.probe.layers import Rule, find_rule, follows_parameters

_COMPLEX = "its numbers are complex; keep real ones, (…, 2), and take torch.view_as_complex of them in the forward pass"


@dataclass(frozen=True)
class Tap:
    """One layer to tap, and its parameters as local name -> full name.

    Without a ``rule`` the parameters are bare: the module computes with them itself, and is followed.
    """

    layer: str
    module: nn.Module
    rule: Rule | None
    parameters: Mapping[str, str]

    def without(self, names: Collection[str]) -> Tap:
        return replace(self, parameters={local: n for local, n in self.parameters.items() if n not in names})


@dataclass(frozen=True)
class _Use:
    """A module that owns a parameter, and the parameter's name in it."""

    layers: tuple[str, ...]  # more than one name where the module itself is shared
    module: nn.Module
    local: str

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(_full(layer, self.local) for layer in self.layers)


@dataclass(frozen=True)
class _Trainable:
    """A trainable parameter and all that own it; ``name`` is its first in ``model.named_parameters()``."""

    name: str
    parameter: nn.Parameter
    uses: tuple[_Use, ...]

    def matches(self, glob: str) -> bool:
        return any(fnmatchcase(name, glob) for use in self.uses for name in (*use.names, *use.layers))

    def obstacle(self, bare: bool = True) -> str | None:
        for use in self.uses:
            rule = _COMPLEX if self.parameter.is_complex() else find_rule(use.module)
            if isinstance(rule, Rule) and rule.routed and not bare:
                rule = "a mixture's experts have no factors"
            followed = isinstance(rule, str) and rule != _COMPLEX and follows_parameters(use.module)
            if followed and not bare:
                rule = "its parameters are followed to where they meet the samples, and have no factors"
            if isinstance(rule, str) and not (bare and followed):
                owner = f"layer {use.layers[0]!r} ({type(use.module).__name__})"
                return f"parameter {self.name!r}: {owner} cannot be tapped exactly: {rule}"
        return None


@dataclass(frozen=True)
class Selection:
    """Parameters in the order of ``model.named_parameters()``.

    Attributes:
        names: those that can be tapped.
        left_out: those that were selected too and cannot be, with the reason.
    """

    names: list[str]
    left_out: Mapping[str, str]


def tapped_parameters(
    model: nn.Module, layers: str | Sequence[str] | None = None, skip_unsupported: bool = False
) -> list[str]:
    """The names of the trainable parameters that a pattern selects, in the order of
    ``model.named_parameters()``.

    A glob that matches a layer's name selects all its parameters; one that matches a parameter's name selects
    this parameter: of a Linear called ``head``, "head" and "head.*" select weight and bias, "head.weight" the
    weight. A parameter with several names (tied weights) is selected by any of them and returned under its
    first. A glob behind a ``!`` leaves out what it matches: ``["*", "!*.conv1d"]``.

    Args:
        model: looked at, not run. Parameters that do not require gradients are never selected.
        layers: a glob or several; None selects everything, () nothing, and so does what is only left out.
        skip_unsupported: leave out what cannot be tapped exactly, instead of raising.

    Raises:
        ValueError: a glob matches nothing trainable, the model has no trainable parameter, or a selected
            layer cannot be tapped exactly.
    """
    return select(model, layers, skip_unsupported).names


def select(
    model: nn.Module, layers: str | Sequence[str] | None, skip_unsupported: bool, bare: bool = True
) -> Selection:
    """``tapped_parameters``, and what it left out. ``bare``: also parameters of modules that have no rule."""
    globs = [layers] if isinstance(layers, str) else layers
    trainable = _trainable(model)
    if not trainable and globs is not None and not globs:
        return Selection([], {})
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: every one is frozen (requires_grad is "
            "False); unfreeze what is to be probed, or ask for no gradients with factors=()"
        )
    if globs is not None:
        trainable = _selected(model, trainable, globs)
    obstacles = {parameter.name: parameter.obstacle(bare) for parameter in trainable}
    left_out = {name: why for name, why in obstacles.items() if why is not None}
    if left_out and not skip_unsupported:
        why = next(iter(left_out.values()))
        raise ValueError(
            f"{why}. Leave it out (layers=['*', '!name']; factors= of a Probe), freeze it, or pass "
            "skip_unsupported=True"
        )
    return Selection([name for name in obstacles if name not in left_out], left_out)


def _selected(model: nn.Module, trainable: Sequence[_Trainable], globs: Sequence[str]) -> list[_Trainable]:
    wanted, unwanted = [g for g in globs if not g.startswith("!")], [g[1:] for g in globs if g.startswith("!")]
    for glob in wanted:
        _check_matches(model, trainable, glob)
    for glob in unwanted:
        _check_known(model, glob)
    return [
        parameter
        for parameter in trainable
        if any(parameter.matches(glob) for glob in wanted) and not any(parameter.matches(glob) for glob in unwanted)
    ]


def make_taps(model: nn.Module, parameters: Collection[str]) -> list[Tap]:
    """A tap for every layer that uses one of the parameters.

    Raises:
        ValueError: a name that is not a trainable parameter's first name, or a layer without a rule.
    """
    trainable = {p.name: p for p in _trainable(model)}
    locals_by_module: dict[nn.Module, dict[str, str]] = defaultdict(dict)
    layer_names: dict[nn.Module, str] = {}
    for name in parameters:
        if name not in trainable:
            raise ValueError(_unknown_parameter(model, trainable, name))
        if obstacle := trainable[name].obstacle():
            raise ValueError(obstacle)
        for use in trainable[name].uses:
            locals_by_module[use.module][use.local] = name
            layer_names[use.module] = use.layers[0]
    taps = []
    for module in model.modules():
        if module in locals_by_module:
            rule = find_rule(module)
            own = rule if isinstance(rule, Rule) else None  # no obstacle: its parameters can be followed
            taps.append(Tap(layer_names[module], module, own, locals_by_module[module]))
    return taps


def coverage(model: nn.Module, parameters: Iterable[str]) -> float:
    """The share of the trainable parameters' elements that ``parameters`` hold; 0 if nothing is trainable."""
    sizes = {p.name: p.parameter.numel() for p in _trainable(model)}
    total = sum(sizes.values())
    return sum(sizes[name] for name in set(parameters)) / total if total else 0.0


def find_module(model: nn.Module, glob: str) -> tuple[str, nn.Module]:
    """The one module whose name matches.

    Raises:
        ValueError: none or several match.
    """
    modules = dict(model.named_modules())
    found = [name for name in modules if fnmatchcase(name, glob)]
    if len(found) != 1:
        several = f"{len(found)} layers: {', '.join(map(repr, found[:4]))}"
        what = several if found else f"no layer; nearest: {_nearest(glob, modules)}"
        raise ValueError(f"{glob!r} matches {what}; expected exactly one")
    return found[0], modules[found[0]]


def _trainable(model: nn.Module) -> list[_Trainable]:
    layers: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        layers[module].append(name)
    uses: dict[int, list[_Use]] = defaultdict(list)
    for module, names in layers.items():
        for local, parameter in module._parameters.items():  # a parameter may have two names in one module
            if parameter is not None:
                uses[id(parameter)].append(_Use(tuple(names), module, local))
    return [_Trainable(name, p, tuple(uses[id(p)])) for name, p in model.named_parameters() if p.requires_grad]


def _check_matches(model: nn.Module, trainable: Sequence[_Trainable], glob: str) -> None:
    if any(parameter.matches(glob) for parameter in trainable):
        return
    _check_known(model, glob)
    raise ValueError(f"{glob!r} matches only frozen parameters; set requires_grad on those to be probed")


def _check_known(model: nn.Module, glob: str) -> None:
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names = {*every, *(name.rpartition(".")[0] for name in every)}
    if not any(fnmatchcase(name, glob) for name in names):
        raise ValueError(f"{glob!r} matches no layer and no parameter; nearest: {_nearest(glob, names)}")


def _unknown_parameter(model: nn.Module, trainable: Mapping[str, _Trainable], name: str) -> str:
    for parameter in trainable.values():
        if any(name in use.names for use in parameter.uses):
            return f"parameter {name!r} is another name of {parameter.name!r}; use that"
    if name in dict(model.named_parameters(remove_duplicate=False)):
        return f"parameter {name!r} is frozen (requires_grad is False), so that it has no gradient"
    return f"{type(model).__name__} has no parameter {name!r}; nearest: {_nearest(name, trainable)}"


def _nearest(name: str, names: Iterable[str]) -> str:
    return ", ".join(repr(found) for found in difflib.get_close_matches(name, list(names), n=3, cutoff=0.0))


def _full(layer: str, local: str) -> str:
    return f"{layer}.{local}" if layer else local
