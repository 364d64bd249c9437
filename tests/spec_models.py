"""A plugin and a model folder whose weight files hold nothing, for tests of specs: no torch, no diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vaepp_sdk.entries import DiTPlan, Option, PipelineEntry, StrategyEntry, TensorPlan, VaeEntry
from vaepp_sdk.markers import hookimpl
from vaepp_sdk.registry import Plugin, Registry

PIPELINE = "ZImagePipeline"
Z_IMAGE = {"n_heads": 30, "dim": 3840}
VAE = {"block_out_channels": [128, 256, 512, 512]}
"""The real model's sizes."""

WEIGHTS = "diffusion_pytorch_model.safetensors"
NO_WEIGHTS = b"\x02" + bytes(7) + b"{}"
"""A safetensors file without a tensor."""


class StandIn:
    """Two strategies, one VAE class, one pipeline, under names of its own."""

    VAEPP_API = 1

    @hookimpl
    def vaepp_register_strategies(self, register: Callable[[Any], None]) -> None:
        halo = Option(name="halo", kind="integer", help="Rows of halo.", minimum=0, maximum=64)
        register(StrategyEntry(name="tiles", factory="nowhere:T", promise="p", uses_tiling=True))
        register(StrategyEntry(name="bands", factory="nowhere:B", promise="p", options=(halo,)))
        register(StrategyEntry(name="other", factory="nowhere:O", promise="p"))

    @hookimpl
    def vaepp_register_vaes(self, register: Callable[[Any], None]) -> None:
        entry = VaeEntry(name="AutoencoderKL", adapter="no:A", strategies=("tiles",), pick=lambda *_: "tiles")
        register(entry)

    @hookimpl
    def vaepp_register_pipelines(self, register: Callable[[Any], None]) -> None:
        widths = {
            "attention heads": lambda config: config["n_heads"],
            "feed-forward width": lambda config: int(config["dim"] / 3 * 8),
        }
        tensor = TensorPlan(blocks=(), colwise=(), rowwise=(), head_attributes=(), widths=widths)
        register(
            PipelineEntry(
                name=PIPELINE,
                module="diffusers.pipelines.z_image.pipeline_z_image",
                vae="AutoencoderKL",
                strategies=("tiles", "bands"),
                stages="nowhere:S",
                dit=DiTPlan(tensor=tensor),
            )
        )


def stand_in_registry() -> Registry:
    """A registry with the stand-in plugin only."""
    registry = Registry()
    registry.add(Plugin("stand_in", "stand-in 1.0"), StandIn())
    return registry


def model_folder(
    folder: Path,
    pipeline: str = PIPELINE,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> Path:
    """Write the JSON files of a model in diffusers format, and weight files that hold nothing."""
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.38.0",
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    configs = {"transformer": transformer or Z_IMAGE, "vae": vae or VAE}
    for component, config in configs.items():
        (folder / component).mkdir()
        (folder / component / "config.json").write_text(json.dumps(config))
        (folder / component / WEIGHTS).write_bytes(NO_WEIGHTS)
    return folder
