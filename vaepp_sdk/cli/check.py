"""`vaepp-run --check`: says what would run, and starts nothing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence

from vaepp_sdk.cli.requests import requests_of
from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.pipeline import prepare
from vaepp_sdk.registry import default_registry
from vaepp_sdk.resolve import Resolved
from vaepp_sdk.runtime.voice import safe
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.vae_rules import serves_one_rank

__all__ = ["check"]


def check(source: str, overrides: Sequence[str], prompts: str | None, *, as_json: bool) -> int:
    """Check a spec as a run would, and print what was decided.

    Args:
        source: the TOML file.
        overrides: `table.key=value` each.
        prompts: a file of requests, or None.
        as_json: print all of it as one JSON object.

    Raises:
        UserError: what a run would refuse before its ranks start.
    """
    spec = PipelineSpec.load(source, overrides)
    upcoming = requests_of(spec, prompts)
    resolved = prepare(spec, upcoming=upcoming)
    if as_json:
        print(json.dumps(resolved.to_dict(), indent=2))
        return 0
    for notice in resolved.notices:
        warnings.warn(notice, VaeppWarning, stacklevel=2)
    count = [("requests", str(len(upcoming.calls)))] if len(upcoming.calls) > 1 else []
    for name, value in [*_decisions(resolved), *count]:
        print(safe(f"{name:<10}{value}"))
    return 0


def _decisions(resolved: Resolved) -> list[tuple[str, str]]:
    vae = resolved.spec.vae
    plain = "one rank, the plain VAE"
    ranks = "1 rank" if resolved.vae_size == 1 else f"{resolved.vae_size} ranks"
    shared = f"{ranks}, strategy {vae.strategy}, output {vae.output}"
    spread = resolved.vae_size > 1 or serves_one_rank(vae, resolved.entry, default_registry())
    # A strategy that needs the VAE's tiling has it switched on; the others do not look at it.
    tiling = {True: "on", False: "off", None: "off" if spread else "the model's own setting"}
    return [
        ("pipeline", resolved.pipeline_class),
        ("model", str(resolved.model_path)),
        ("device", resolved.spec.model.device),
        ("ranks", str(resolved.dims)),
        ("vae", f"{shared if spread else plain}; tiling: {tiling[resolved.use_tiling]}"),
    ]
