"""The whole spec, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.spec.adapters import Adapter, placed_adapters
from vaepp_sdk.spec.calls import split_calls
from vaepp_sdk.spec.classes import MAX_RANKS, LimitsSpec, ModelSpec, OutputSpec, ParallelSpec, VaeSpec
from vaepp_sdk.spec.overrides import apply_overrides
from vaepp_sdk.spec.places import model_place, output_place
from vaepp_sdk.spec.reading import read_toml
from vaepp_sdk.spec.structure import structure
from vaepp_sdk.spec.values import RefusedError, about
from vaepp_sdk.text import clean, shown

__all__ = ["PipelineSpec"]


@attrs.frozen(kw_only=True)
class PipelineSpec:
    """What to run and how to spread it.

    Attributes:
        more_calls: the `[[call]]` entries after the first, which is `call`, as they were written.
        source: where it came from, for messages.
        base: the folder that relative paths were relative to.
    """

    model: ModelSpec = attrs.field(metadata=about("What to load."))
    parallel: ParallelSpec = attrs.field(factory=ParallelSpec, metadata=about("How ranks are spread."))
    vae: VaeSpec = attrs.field(factory=VaeSpec, metadata=about("How the VAE works, alone and over ranks."))
    call: Mapping[str, Any] = attrs.field(
        factory=dict,
        metadata=about(
            "The pipeline's own keyword arguments, and `seed`. As `[[call]]`, one request each: what an "
            "entry leaves out is as in the first."
        ),
    )
    output: OutputSpec | None = attrs.field(default=None, metadata=about("Where pictures are saved."))
    limits: LimitsSpec = attrs.field(factory=LimitsSpec, metadata=about("The longest waits, in seconds."))
    more_calls: tuple[Mapping[str, Any], ...] = ()
    source: str = attrs.field(default="the spec", eq=False)
    base: Path = attrs.field(factory=Path.cwd, eq=False)

    @classmethod
    def load(
        cls, source: str | Path | Mapping[str, Any] | PipelineSpec, overrides: Sequence[str] = ()
    ) -> PipelineSpec:
        """Load and check a spec.

        Relative paths in a file are relative to its folder; those in a mapping to the working directory.

        Args:
            source: a TOML file, the same tables as a mapping, or a spec, which is checked again.
            overrides: `table.key=value` each, applied in order.

        Raises:
            SpecError: with every fault found.
        """
        raw, name, base = _open(source)
        tables, faults = apply_overrides(raw, overrides)
        tables, more_calls, found = split_calls(tables)
        faults += found
        spec, found = structure(tables, cls)
        faults += found
        places, found = _places(tables, base)
        lora, problems = _adapters(spec, base)
        faults += [*found, *problems, *_product_faults(tables)]
        if faults or spec is None:
            raise SpecError(_first_each(faults), name)
        return attrs.evolve(_placed(spec, places, lora), more_calls=more_calls, source=name, base=base)

    @property
    def calls(self) -> tuple[Mapping[str, Any], ...]:
        """The arguments of each request the spec asks for: one, or one for each `[[call]]` entry."""
        return (self.call, *({**self.call, **entry} for entry in self.more_calls))

    def to_dict(self) -> dict[str, Any]:
        """The tables as plain data that JSON can hold; loading them gives an equal spec."""
        tables = attrs.asdict(
            self, filter=lambda field, _: field.name not in ("more_calls", "source", "base")
        )
        tables["model"]["lora"] = list(tables["model"]["lora"])
        if self.more_calls:
            tables["call"] = [dict(self.call), *map(dict, self.more_calls)]
        if self.output is None:
            del tables["output"]
        return tables

    def to_shareable(self) -> dict[str, Any]:
        """What made a picture, for the picture's own metadata: no path of the machine that made it.

        A local model is named by its folder alone; left out are where pictures went, how long waits may last,
        and several `[[call]]` entries, of which a picture comes from one.
        """
        tables = self.to_dict()
        tables.pop("output", None)
        if self.more_calls:
            del tables["call"]
        del tables["limits"]
        for adapter in tables["model"]["lora"]:
            adapter["path"] = Path(adapter["path"]).name
        if self.model.folder is not None:
            tables["model"]["id"] = self.model.folder.name
        return tables


def _open(source: object) -> tuple[Mapping[str, Any], str, Path]:
    """The tables behind a source, its name for messages, and the folder relative paths start from."""
    here = _working_folder()
    if source == "":
        raise SpecError([Fault("$", "found an empty string", "give the path of a TOML file")])
    if isinstance(source, PipelineSpec):
        return source.to_dict(), source.source, source.base
    if isinstance(source, Mapping):
        return dict(source), "the spec", here
    if isinstance(source, str | Path):
        path = Path(source)
        return read_toml(path), clean(str(path), 300), (here / path).parent
    wanted = "give a path, a mapping or a PipelineSpec"
    raise SpecError([Fault("$", f"found {shown(source)}", wanted)])


def _working_folder() -> Path:
    try:
        return Path.cwd()
    except OSError:
        found = "the working directory no longer exists"
        raise SpecError([Fault("$", found, "change to a folder that does")]) from None


def _places(tables: Mapping[str, Any], base: Path) -> tuple[dict[str, str], list[Fault]]:
    """The absolute model and output places; wrong types are somebody else's fault."""
    places, faults = {}, []
    for table, key, rule in (("model", "id", model_place), ("output", "dir", output_place)):
        inner = tables.get(table)
        text = inner.get(key) if isinstance(inner, Mapping) else None
        if table == "output" and isinstance(inner, Mapping) and key not in inner:
            text = OutputSpec().dir
        if not isinstance(text, str):
            continue
        try:
            places[table] = rule(text, base)
        except RefusedError as problem:
            faults.append(Fault(f"$.{table}.{key}", problem.found, problem.fix))
    return places, faults


def _placed(spec: PipelineSpec, places: Mapping[str, str], lora: tuple[Adapter, ...]) -> PipelineSpec:
    model = attrs.evolve(spec.model, id=places["model"], lora=lora)
    output = attrs.evolve(spec.output, dir=places["output"]) if spec.output else None
    return attrs.evolve(spec, model=model, output=output)


def _adapters(spec: PipelineSpec | None, base: Path) -> tuple[tuple[Adapter, ...], list[Fault]]:
    """The LoRA adapters with absolute paths."""
    try:
        return placed_adapters(spec.model.lora if spec else (), base), []
    except RefusedError as problem:
        return (), [Fault("$.model.lora", problem.found, problem.fix)]


def _product_faults(tables: Mapping[str, Any]) -> list[Fault]:
    """The number of ranks the sizes ask for together, where each size alone is fine."""
    sizes = tables.get("parallel")
    parallel, _ = structure(sizes, ParallelSpec) if isinstance(sizes, Mapping) else (None, [])
    if parallel is None or parallel.dims.dit_parallel_size <= MAX_RANKS:
        return []
    ranks = parallel.dims.dit_parallel_size
    return [Fault("$.parallel", f"the sizes multiply to {ranks} ranks", f"at most {MAX_RANKS} work")]


def _first_each(faults: Sequence[Fault]) -> list[Fault]:
    """One fault per path: the first says what matters."""
    return list({fault.path: fault for fault in reversed(faults)}.values())[::-1]
