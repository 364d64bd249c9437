"""`vaepp-run --check`: says what would run, and starts nothing."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence

from vaepp_sdk.cli.printing import safe
from vaepp_sdk.errors import VaeppWarning
from vaepp_sdk.registry import default_registry
from vaepp_sdk.request import make_request
from vaepp_sdk.resolve import Resolved, resolve
from vaepp_sdk.runtime.inplace import check_size, find_launch
from vaepp_sdk.spec import PipelineSpec
from vaepp_sdk.vae_rules import serves_one_rank

__all__ = ["check"]


def check(source: str, overrides: Sequence[str], *, as_json: bool) -> int:
    """Check a spec as a run would, and print what was decided.

    Raises:
        UserError: what a run would refuse before its ranks start.
    """
    spec = PipelineSpec.load(source, overrides)
    launch = find_launch(os.environ)
    if launch is not None:
        check_size(launch, spec.parallel.dims.dit_parallel_size, spec.source)
    resolved = resolve(spec, default_registry())
    make_request(resolved, {}, 0, save=True)
    if as_json:
        print(json.dumps(resolved.to_dict(), indent=2))
        return 0
    for notice in resolved.notices:
        warnings.warn(notice, VaeppWarning, stacklevel=2)
    for name, value in _decisions(resolved):
        print(safe(f"{name:<10}{value}"))
    return 0


def _decisions(resolved: Resolved) -> list[tuple[str, str]]:
    vae = resolved.spec.vae
    tiling = {True: "on", False: "off", None: "the model's own setting"}[resolved.use_tiling]
    plain = "one rank, the plain VAE"
    ranks = "1 rank" if resolved.vae_size == 1 else f"{resolved.vae_size} ranks"
    shared = f"{ranks}, strategy {vae.strategy}, output {vae.output}"
    alone = serves_one_rank(vae, resolved.entry, default_registry())
    return [
        ("pipeline", resolved.pipeline_class),
        ("model", str(resolved.model_path)),
        ("device", resolved.spec.model.device),
        ("ranks", str(resolved.dims)),
        ("vae", f"{shared if resolved.vae_size > 1 or alone else plain}; tiling: {tiling}"),
    ]
