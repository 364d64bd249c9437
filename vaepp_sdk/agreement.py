"""What ranks must state alike before they go on together."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch

from vaepp_sdk.assembly import software
from vaepp_sdk.parallel.fingerprint import fingerprint
from vaepp_sdk.registry import Registry
from vaepp_sdk.request import Request
from vaepp_sdk.resolve import Resolved

__all__ = ["latent_facts", "stage_facts", "start_facts"]

_SHORT = 40


def start_facts(resolved: Resolved, registry: Registry) -> dict[str, str]:
    """What every rank of a job must have alike: spec, decisions, versions and plugins.

    Folders of this machine are left out: nodes may keep the same model in different places.
    """
    spec = resolved.spec
    output = {"keep_latents": False, "allow_nonfinite": False, "overwrite": False}
    if spec.output is not None:
        output = {name: getattr(spec.output, name) for name in output}
    tables = {**spec.to_shareable(), "call": list(spec.calls), "output": output}
    facts = {f"{table}.{key}": _text(value) for table, keys in _tables(tables) for key, value in keys}
    facts |= {
        "the model": resolved.model_path.name,
        "the pipeline": resolved.pipeline_class,
        "ranks of the VAE": str(resolved.vae_size),
        "tiling": str(resolved.use_tiling),
        "the software": f"{software()}, Python {platform.python_version()}",
    }
    for plugin in registry.plugins:
        facts[f"plugin {plugin.name}"] = f"{plugin.distribution}{' (not in use)' if plugin.problem else ''}"
    return facts


def stage_facts(stage: str, request: Request) -> dict[str, str]:
    """What every rank must be about to do."""
    asked = {**request.to_dict(), "latents": len(request.latents)}
    return {"the stage": stage, "the request": _digest(json.dumps(asked, sort_keys=True))}


def latent_facts(latents: torch.Tensor | None, replica: int | None = None) -> dict[str, str]:
    """That the ranks of a replica, or all ranks, hold the same latents; nothing where there are none."""
    if latents is None:
        return {}
    name = "the latents" if replica is None else f"the latents of replica {replica}"
    return {name: fingerprint(latents)}


def _tables(tables: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    return [
        (name, list(table.items()) if isinstance(table, Mapping) else [("entries", table)])
        for name, table in tables.items()
    ]


def _text(value: Any) -> str:
    """A value to compare and to read: itself where it is short."""
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}... ({_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
