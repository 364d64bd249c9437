"""Many requests of one command: served one after the other by the same ranks, each with its own outcome."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.cli.printing import speaks, stage_rows, table
from vaepp_sdk.errors import Fault, RequestError, SpecError, UserError, VaeppError
from vaepp_sdk.pipeline import Pipeline, Result
from vaepp_sdk.runtime.voice import complain, safe
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.spec.prompts import NamedCall, Upcoming, read_prompts

__all__ = ["requests_of", "serve"]

_FAILED, _REFUSED = 1, 2
"""The exit codes where a request failed, and where one was refused, which is the user's mistake."""


@attrs.frozen
class _Outcome:
    """What became of one request.

    Attributes:
        name: where it stands.
        summary: what it gave, or why it gave nothing, as plain data.
        seconds: the slowest rank's, over all stages.
        word: `served`, `refused`, or `failed` where it was not the user's mistake.
    """

    name: str
    summary: dict[str, Any]
    seconds: float = 0.0
    word: str = "served"


def requests_of(spec: PipelineSpec, prompts: str | None) -> Upcoming:
    """The requests of a command: those of a file of prompts, or else of the spec.

    Raises:
        SpecError: the file cannot be used, or both hold requests.
    """
    if prompts is None:
        names = [f"call[{index}]" for index in range(len(spec.calls))] if spec.more_calls else ["call"]
        named = zip(names, spec.calls, strict=True)
        return Upcoming([NamedCall(name, f"$.{name}", dict(call)) for name, call in named])
    if spec.more_calls:
        found = f"it holds {len(spec.calls)} [[call]] entries, and --prompts names requests too"
        raise SpecError([Fault("$.call", found, "keep one [call] with what all share")], spec.source)
    if not prompts:
        fix = "give the path of a file of JSON lines"
        raise SpecError([Fault("$", "found an empty string", fix)], "--prompts")
    return read_prompts(Path(prompts))


def serve(pipeline: Pipeline, calls: Sequence[NamedCall], *, as_json: bool, quiet: bool) -> int:
    """Serve requests in order; one that is refused leaves the others as they are.

    Args:
        pipeline: a started pipeline.
        calls: the requests.
        as_json: print one JSON object at the end, and no file as it comes.
        quiet: print only the files.

    Returns:
        The exit code.

    Raises:
        VaeppError: the ranks are gone; what was served before is reported first.
    """
    outcomes: list[_Outcome] = []
    try:
        for call in calls:
            outcomes.append(_served(pipeline, call, as_json=as_json))  # noqa: PERF401 - kept if one fails
    except VaeppError as error:
        left = len(calls) - len(outcomes)
        error.add_note(f"it was request {len(outcomes) + 1} of {len(calls)}, {calls[len(outcomes)].name}")
        error.add_note(f"{len(outcomes)} came before it; {left} got no picture, this one included")
        raise
    finally:
        _report(outcomes, pipeline.notices, as_json=as_json, quiet=quiet)
    words = {outcome.word for outcome in outcomes}
    return _FAILED if "failed" in words else _REFUSED if "refused" in words else 0


def _served(pipeline: Pipeline, call: NamedCall, *, as_json: bool) -> _Outcome:
    try:
        result = pipeline(**call.arguments)
    except (UserError, RequestError) as error:
        word = "refused" if isinstance(error, UserError) else "failed"
        if speaks():
            told = f"{call.name} {'is refused' if word == 'refused' else 'failed'}: {error}"
            complain(told, *getattr(error, "__notes__", ()))
        return _Outcome(call.name, {"error": str(error)}, word=word)
    if speaks() and not as_json:
        for file in result.files:
            print(safe(file), flush=True)
    rows = stage_rows(result.stages)
    return _Outcome(call.name, _summary(result), sum(row.seconds for row in rows if row.stage != "load"))


def _summary(result: Result) -> dict[str, Any]:
    return {
        "files": list(result.files),
        "seed": result.seed,
        "stages": [attrs.asdict(row) for row in stage_rows(result.stages)],
        "latents": result.latents,
    }


def _report(outcomes: Sequence[_Outcome], notices: Sequence[str], *, as_json: bool, quiet: bool) -> None:
    if not speaks() or not outcomes:
        return
    if as_json:
        requests = [{"request": outcome.name, **outcome.summary} for outcome in outcomes]
        print(json.dumps({"requests": requests, "notices": list(notices)}, indent=2))
    elif not quiet:
        words = Counter(outcome.word for outcome in outcomes)
        failed = f", {words['failed']} failed" if words["failed"] else ""
        print()
        print(safe(table([_row(outcome) for outcome in outcomes])))
        print()
        print(f"{words['served']} requests served, {words['refused']} refused{failed}")


def _row(outcome: _Outcome) -> dict[str, str]:
    if outcome.word != "served":
        return {"request": outcome.name, "seed": "-", "seconds": "-", "files": outcome.word}
    files, seed = len(outcome.summary["files"]), outcome.summary["seed"]
    seconds = f"{outcome.seconds:.2f}"
    return {"request": outcome.name, "seed": str(seed), "seconds": seconds, "files": str(files)}
