"""The search space: model's layers × (target ∩ methods ∩ spec), fusion groups, exact bytes; and its KV caches.

Built from a model's skeleton, before any weight is loaded, so that what cannot run is refused early
with the layer, its shape and the rule.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import cast

from autoq import folding, plugins
from autoq.assignment import Assignment
from autoq.errors import SchemeRefused, SpecError
from autoq.kv_cache import GROUP, Cache, CacheScheme, KeyValue
from autoq.layer import ONE_PASS, Layer, ModelInfo
from autoq.methods import Grid, Method
from autoq.scheme import (
    FLOAT_FORMATS,
    FloatFormat,
    Granularity,
    Keep,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Scheme,
    parse_scheme,
)
from autoq.sparsity import SPARSITY_CHOICES, TwoOfFour, parse_pattern
from autoq.spec import OverrideSpec, SpaceSpec
from autoq.targets import Target

Refusal = Callable[[Layer, Scheme], str | None]


@dataclass(frozen=True)
class Variable:
    """One decision of the search: the scheme of a layer, of a fusion group that must share one, of the same
    matrix of all of a block's experts, or of a KV cache.

    `choices` are sorted by bytes, fewest first, so that an index is an ordinal quantity: those that ship, or of a cache
    those of one group of tokens. What a choice costs in an objective, `autoq.search.tables` says.
    """

    name: str
    members: tuple[Layer, ...] | tuple[Cache]
    choices: tuple[Scheme, ...] | tuple[CacheScheme, ...]


@dataclass(frozen=True)
class SearchSpace:
    """All decisions. Layers and KV caches that no variable holds stay as they are."""

    info: ModelInfo
    variables: tuple[Variable, ...]

    @cached_property
    def _kept(self) -> dict[str, Scheme]:
        return {layer.name: Keep() for layer in self.info.layers}

    @cached_property
    def choices(self) -> dict[str, tuple[Scheme, ...] | tuple[CacheScheme, ...]]:
        """Name -> schemes, of the searched layers and caches."""
        return {member.name: variable.choices for variable in self.variables for member in variable.members}

    @cached_property
    def _positions(self) -> list[dict[Scheme | CacheScheme, int]]:
        """Scheme -> index, of every variable: a resumed study looks up millions of them."""
        return [{scheme: index for index, scheme in enumerate(variable.choices)} for variable in self.variables]

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The searched layers by name."""
        return {m.name: m for variable in self.variables for m in variable.members if isinstance(m, Layer)}

    @cached_property
    def caches(self) -> dict[str, Cache]:
        """The searched KV caches by name."""
        return {m.name: m for variable in self.variables for m in variable.members if isinstance(m, Cache)}

    @property
    def size(self) -> int:
        """Number of assignments."""
        product = 1
        for variable in self.variables:
            product *= len(variable.choices)
        return product

    def assignment(self, indices: Sequence[int]) -> Assignment:
        """The assignment of one choice index per variable."""
        assert len(indices) == len(self.variables)
        schemes, caches = dict(self._kept), {}
        for variable, index in zip(self.variables, indices, strict=True):
            scheme = variable.choices[index]
            if isinstance(scheme, KeyValue):
                caches[variable.name] = scheme
            elif variable.name not in self.caches:
                for layer in variable.members:
                    schemes[layer.name] = scheme
        return Assignment(schemes, caches=caches)

    def assignment_of(self, schemes: Mapping[str, Scheme]) -> Assignment:
        """`schemes` (layer -> scheme, of every layer) on the layers that are searched; all others are kept."""
        return Assignment({**self._kept, **{name: schemes[name] for name in self.layers}})

    def cached(self, scheme: KeyValue) -> Assignment:
        """All searched caches under `scheme`; all layers are kept."""
        return Assignment(self._kept, caches=dict.fromkeys(self.caches, scheme))

    def indices(self, assignment: Assignment) -> list[int] | None:
        """The choice indices of an assignment, or None if it lies outside of the space."""
        found = []
        every: dict[str, Scheme | KeyValue] = {**dict.fromkeys(self.caches, Keep()), **assignment, **assignment.caches}
        for variable, positions in zip(self.variables, self._positions, strict=True):
            schemes = {every[member.name] for member in variable.members}
            if len(schemes) != 1 or (index := positions.get(schemes.pop())) is None:
                return None
            found.append(index)
        outside = any(scheme != Keep() for name, scheme in every.items() if name not in self.choices)
        return None if outside else found

    def uniform(self, preference: Sequence[Scheme], refuses: Refusal) -> Assignment:
        """Every searched layer under the first scheme of `preference` that runs on it, else kept.

        Runs means on the target, whether or not the study's own choices hold the scheme: a baseline
        is what people would do without the search.
        """
        schemes = dict(self._kept)
        for variable in self.variables:
            layers = [self.layers[member.name] for member in variable.members if member.name in self.layers]
            for scheme in preference:
                if not any(refuses(layer, scheme) for layer in layers):
                    schemes |= {layer.name: scheme for layer in layers}
                    break
        return Assignment(schemes)


def refusal(target_name: str, target: Target) -> Refusal:
    """Why a scheme cannot be made or run for a layer, asked of the method, then of the target."""

    def refuses(layer: Layer, scheme: Scheme) -> str | None:
        method = plugins.load("methods", scheme.method, Method)
        if (rule := method.refuses(layer, scheme)) is not None:
            return f"{scheme.method}: {rule}"
        if (rule := target.refuses(layer, scheme)) is not None:
            return f"{target_name}: {rule}"
        return None

    return refuses


def build_space(info: ModelInfo, spec: SpaceSpec, target_name: str, target: Target) -> SearchSpace:
    """The search space of a model on a target.

    Raises `SchemeRefused` for a layer that nothing of what the spec asks for can run, and for a scheme
    or value that the spec spells out and that no layer can run, naming layer, shape and rule; and
    `SpecError` where nothing is left to search.
    """
    refuses = refusal(target_name, target)
    kinds = {kind for wanted in spec.kinds for kind in ({"linear", "conv1d"} if wanted == "linear" else {wanted})}
    # A tied head is the embedding too, so either word includes it.
    layers = [
        layer
        for layer in info.layers
        if (layer.kind in kinds or (layer.tied and "embedding" in kinds)) and not _matches(layer, spec.exclude)
    ]
    caches = _caches(info, spec, target_name, target)
    if not layers and not caches:
        raise SpecError(
            f"space: no layer is left to search; kinds {', '.join(spec.kinds)}, exclude {list(spec.exclude)}"
        )
    parts: list[Layer | Cache] = [*info.layers, *info.caches]
    for pattern in spec.exclude:
        if not any(_matches(part, [pattern]) for part in parts):
            raise SpecError(f"space.exclude: {pattern!r} matches no layer of the model")
    for index, override in enumerate(spec.overrides):
        if not any(fnmatch.fnmatchcase(layer.name, override.match) for layer in layers):
            raise SpecError(f"space.overrides.{index}.match: {override.match!r} matches no searched layer")
    if target.fuses and spec.experts == "apart" and any(layer.stack for layer in layers):
        raise SpecError(f"space.experts: apart: {target_name} runs the experts of a block as one; leave it out")
    options = {layer.name: _options(layer, _section(layer, spec), target.grid(), refuses) for layer in layers}
    _refuse_unusable(layers, spec, target.grid(), refuses)
    variables = tuple(_variables(layers, options, target.fuses, spec.experts == "together"))
    _refuse_unfoldable(info, variables, [cache.name for cache in caches])
    return SearchSpace(info, (*variables, *caches))


def _refuse_unfoldable(info: ModelInfo, variables: Sequence[Variable], caches: Sequence[str]) -> None:
    """Refuse scales of inputs that an assignment of the space could not fold, whatever its other layers are."""
    choices = {part.name: variable.choices for variable in variables for part in variable.members}
    readers, layers = folding.readers(info.layers), {layer.name for layer in info.layers}
    for name, own in choices.items():
        scheme, source = next(filter(folding.is_folded, own), None), info.layer(name).source
        if scheme is None:
            continue
        assert source is not None
        cache = folding.through_cache(info.layer(name), caches)
        rule = None if cache is None else f"it scales the values of {cache}, whose KV cache is searched"
        # Its fellows share its variable, or are not searched and kept.
        for other in readers[source.module]:
            if other.name not in choices and other.tied:
                rule = f"what {name} reads is read by {other.name}, too, whose weight is an embedding's"
        for given in choices.get(source.module, ()) if source.module in layers else ():
            assert not isinstance(given, KeyValue)
            if (refused := folding.rows_refuse(given)) is not None:
                rule = f"its scales would be folded into {source.module}, and as {given} {refused}"
        if rule is not None:
            raise SchemeRefused(f"space: {name} as {scheme}: {rule}; leave one of these schemes out (overrides)")


def _caches(info: ModelInfo, spec: SpaceSpec, target_name: str, target: Target) -> list[Variable]:
    """A variable for each KV cache that is searched. Raises `SpecError`, and `SchemeRefused` for the target's rule."""
    if not spec.kv_cache:
        return []
    if not info.caches:
        why = "decodes nothing" if info.task in ONE_PASS else "has none that is known; causal decoders have"
        raise SpecError(f"space.kv_cache: it needs a model with KV caches, and {info.architecture} {why}")
    found = []
    for cache in info.caches:
        if _matches(cache, spec.exclude):
            continue
        choices: list[CacheScheme] = [Keep(), *dict.fromkeys(map(KeyValue, spec.kv_cache))]
        for scheme in choices:
            rule = target.refuses_cache(cache, scheme) if isinstance(scheme, KeyValue) else None
            if rule is not None:
                raise SchemeRefused(f"space.kv_cache: {target_name} cannot run {scheme} on {cache.name}: {rule}")
        # By what a group of tokens takes: equal amounts of text, whatever the workload.
        found.append(Variable(cache.name, (cache,), tuple(sorted(choices, key=partial(cache.nbytes, tokens=GROUP)))))
    return found


def _matches(part: Layer | Cache, patterns: Iterable[str]) -> bool:
    names = (part.name, *part.tied) if isinstance(part, Layer) else (part.name,)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _section(layer: Layer, spec: SpaceSpec) -> SpaceSpec | OverrideSpec:
    """The last override that matches, as later lines win, or the space itself."""
    matching = [override for override in spec.overrides if fnmatch.fnmatchcase(layer.name, override.match)]
    return matching[-1] if matching else spec


def _granularity(value: int | str) -> Granularity | PerBlock:
    if isinstance(value, int):
        return PerGroup(value)
    if value in ("channel", "tensor"):
        return PerChannel() if value == "channel" else PerTensor()
    rows, _, columns = value.partition("x")
    return PerBlock(int(rows), int(columns))


def _grid(section: SpaceSpec | OverrideSpec, default: Grid) -> Grid:
    """The section's axes; one that is left out is the target's."""
    activations = (
        None if section.activations is None else tuple(None if a == "none" else a for a in section.activations)
    )
    sizes = [_granularity(value) for value in section.group_size or ()]
    return Grid(
        methods=section.methods or default.methods,
        bits=section.bits or default.bits,
        granularities=default.granularities
        if section.group_size is None
        else tuple(size for size in sizes if not isinstance(size, PerBlock)),
        zero_points=section.zero_points or default.zero_points,
        activations=activations or default.activations,
        formats=section.formats or default.formats,
        blocks=default.blocks
        if section.group_size is None
        else tuple(size for size in sizes if isinstance(size, PerBlock)),
        sparsity=tuple(map(parse_pattern, section.sparsity or ())),
        folds=default.folds,
    )


def _candidates(section: SpaceSpec | OverrideSpec, default: Grid) -> list[Scheme]:
    """The schemes that a section names or spans, without repeats."""
    if section.schemes is not None:
        return list(dict.fromkeys(parse_scheme(text) for text in section.schemes))
    grid = _grid(section, default)
    found: dict[Scheme, None] = {}
    for name in grid.methods:
        method = plugins.load("methods", name, Method)
        own = list(method.schemes(name, grid))
        if not own and not grid.sparsity and any(method.schemes(name, replace(grid, sparsity=(TwoOfFour(),)))):
            raise SpecError(f"space.methods: {name} prunes, and space.sparsity is not given; {SPARSITY_CHOICES}")
        found |= dict.fromkeys(own)
    return list(found)


def _options(layer: Layer, section: SpaceSpec | OverrideSpec, default: Grid, refuses: Refusal) -> list[Scheme]:
    candidates = _candidates(section, default)
    usable = [scheme for scheme in candidates if refuses(layer, scheme) is None]
    if not usable:
        shown = "; ".join(f"{scheme} ({refuses(layer, scheme)})" for scheme in candidates[:3])
        more = f"; and {len(candidates) - 3} more" if len(candidates) > 3 else ""
        raise SchemeRefused(
            f"space: layer {layer.name} of shape ({layer.out_features}, {layer.in_features}) can run none of: "
            f"{shown or '(the grid spans no scheme)'}{more}; exclude it or widen the space"
        )
    return usable


def _refuse_unusable(layers: Sequence[Layer], spec: SpaceSpec, default: Grid, refuses: Refusal) -> None:
    """Refuse what a section spells out and no layer of it can run: it would vanish without a word."""
    sections: list[SpaceSpec | OverrideSpec] = [spec, *spec.overrides]
    for section in sections:
        own = [layer for layer in layers if _section(layer, spec) is section]
        if not own:
            continue
        candidates = _candidates(section, default)
        usable = {scheme for scheme in candidates if any(refuses(layer, scheme) is None for layer in own)}
        asked: list[tuple[str, Callable[[Scheme], bool]]] = [
            *((f"schemes: {text}", partial(_is, "", text)) for text in section.schemes or ()),
            *((f"methods: {method}", partial(_is, "method", method)) for method in section.methods or ()),
            *((f"bits: {bits}", partial(_is, "bits", bits)) for bits in section.bits or ()),
            *(
                (f"group_size: {size}", partial(_is, "granularity", _granularity(size)))
                for size in section.group_size or ()
            ),
            *((f"formats: {name}", partial(_is, "format", name)) for name in section.formats or ()),
            *((f"sparsity: {text}", partial(_is, "pattern", parse_pattern(text))) for text in section.sparsity or ()),
        ]
        for what, asks in asked:
            if any(asks(scheme) for scheme in usable):
                continue
            scheme = next((scheme for scheme in candidates if asks(scheme)), None)
            layer = own[0]
            if scheme is None:
                names = ", ".join((section.methods or default.methods) if section.schemes is None else ())
                hint = _needs(what.removeprefix("formats: ")) if what.startswith("formats: ") else ""
                raise SchemeRefused(f"space.{what} gives no scheme with the methods {names}{hint}")
            rule = refuses(layer, scheme)
            raise SchemeRefused(
                f"space.{what} runs on no layer; for instance {layer.name} of shape "
                f"({layer.out_features}, {layer.in_features}) as {scheme}: {rule}"
            )


def _needs(name: str) -> str:
    """What a grid must hold beside the floating-point format `name`."""
    form = FLOAT_FORMATS[cast("FloatFormat", name)]
    group = "" if form.group is None else f" group_size {form.group},"
    return f"; {name} needs the method rtn,{group} bits {form.bits} and zero_points none"


def _is(attribute: str, wanted: object, scheme: Scheme) -> bool:
    """Whether the scheme has that attribute at that value; its text form for an empty attribute."""
    return (getattr(scheme, attribute, None) if attribute else str(scheme)) == wanted


def _variables(
    layers: Sequence[Layer], options: Mapping[str, Sequence[Scheme]], fuses: bool, together: bool
) -> Iterable[Variable]:
    groups: dict[str, list[Layer]] = {}
    folds = {
        layer.source.module: layer
        for layer in layers
        if layer.source is not None and any(map(folding.is_folded, options[layer.name]))
    }
    for layer in layers:
        group = layer.fusion_group if fuses else layer.stack if together else None
        if layer.source is not None and layer.source.module in folds:
            # Scales that are folded are those of all that read the same inputs.
            first = folds[layer.source.module]
            group = (first.fusion_group if fuses else None) or f"inputs from {layer.source.module}"
        groups.setdefault(group or layer.name, []).append(layer)
    for name, members in groups.items():
        if name.startswith("inputs from ") and len(members) == 1:
            name = members[0].name
        shared = [scheme for scheme in options[members[0].name] if all(scheme in options[m.name] for m in members)]
        if not shared:
            one, other = members[0], members[-1]
            why = "are one layer on this target" if fuses else "are experts that are searched together"
            why = "read the same inputs, whose scales are folded," if name.startswith("inputs from ") else why
            raise SchemeRefused(f"space: {one.name} and {other.name} {why} and have no scheme in common")
        sizes = {scheme: sum(member.nbytes(scheme) for member in members) for scheme in shared}
        yield Variable(name, tuple(members), tuple(sorted(shared, key=lambda scheme: (sizes[scheme], str(scheme)))))
