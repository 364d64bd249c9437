"""`vaepp-run pipeline.toml` makes the pictures of a spec, `vaepp-run --resume` those of kept latents."""

from __future__ import annotations

import json
from collections.abc import Sequence

import attrs

from vaepp_sdk.cli.printing import speaks, stage_rows, table
from vaepp_sdk.cli.progress import Bars
from vaepp_sdk.cli.requests import requests_of, serve
from vaepp_sdk.kept import KeptRun
from vaepp_sdk.pipeline import Pipeline, Result
from vaepp_sdk.runtime.voice import safe
from vaepp_sdk.spec import PipelineSpec

__all__ = ["resume", "run"]

_MIB = 2**20


def run(source: str, overrides: Sequence[str], prompts: str | None, *, as_json: bool, quiet: bool) -> int:
    """Run one spec from start to saved pictures: one request, or many one after the other.

    Args:
        source: the TOML file.
        overrides: `table.key=value` each.
        prompts: a file of requests, or None for those of the spec.
        as_json: print one JSON object instead of the table.
        quiet: draw no progress and print only the files.

    Raises:
        VaeppError: see `Pipeline`.
    """
    spec = _saving(source, overrides)
    upcoming = requests_of(spec, prompts)
    with (
        Bars(quiet) as bars,
        Pipeline.from_spec(spec, on_event=bars.on_event, upcoming=upcoming) as pipeline,
    ):
        if prompts is not None or spec.more_calls:
            return serve(pipeline, upcoming.calls, as_json=as_json, quiet=quiet)
        result = pipeline()
    return _report(result, as_json=as_json, quiet=quiet)


def resume(folder: str, overrides: Sequence[str], *, as_json: bool, quiet: bool) -> int:
    """Decode and save the latents that a run has kept.

    Args:
        folder: the run's folder.
        overrides: `table.key=value` each.
        as_json: print one JSON object instead of the table.
        quiet: draw no progress and print only the files.

    Raises:
        VaeppError: see `Pipeline.resume`.
    """
    with Bars(quiet) as bars:
        result = Pipeline.resume(folder, _resumed_output(folder, overrides), on_event=bars.on_event)
    return _report(result, as_json=as_json, quiet=quiet)


def _report(result: Result, *, as_json: bool, quiet: bool) -> int:
    if not speaks():
        return 0
    if as_json:
        print(json.dumps(_summary(result), indent=2))
        return 0
    if not quiet:
        print(table(_table_rows(result)))
        print()
        if result.latents is not None:
            print(safe(f"latents: {result.latents}"))
    for file in result.files:
        print(safe(file))
    return 0


def _saving(source: str, overrides: Sequence[str]) -> PipelineSpec:
    """The spec, with the default output folder where it names none: a command saves what it makes."""
    spec = PipelineSpec.load(source, overrides)
    if spec.output is not None:
        return spec
    return PipelineSpec.load(source, [*overrides, 'output.dir="out"'])


def _resumed_output(folder: str, overrides: Sequence[str]) -> Sequence[str]:
    """The overrides, with a folder here where the run that made the latents saved nothing."""
    named = "output" in KeptRun.read(folder).spec or any(text.startswith("output.") for text in overrides)
    return overrides if named else [*overrides, 'output.dir="out"']


def _summary(result: Result) -> dict[str, object]:
    return {
        "files": list(result.files),
        "seed": result.seed,
        "stages": [attrs.asdict(row) for row in stage_rows(result.stages)],
        "notices": list(result.notices),
        "latents": result.latents,
    }


def _table_rows(result: Result) -> list[dict[str, str]]:
    rows = []
    for row in stage_rows(result.stages):
        cells = {
            f"rank {rank} peak MiB": "-" if peak is None else f"{peak / _MIB:.0f}"
            for rank, peak in enumerate(row.peak_bytes)
        }
        rows.append({"stage": row.stage, "seconds": f"{row.seconds:.2f}", **cells})
    return rows
