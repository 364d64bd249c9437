"""The tables of a spec, one class each.

A key's description, range and choices stand in its field's metadata and nowhere else: the checks, the
reference and the editor schema are made from it. Values are checked by `PipelineSpec.load`, not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.spec.adapters import Adapter
from vaepp_sdk.spec.values import about

__all__ = ["MAX_RANKS", "LimitsSpec", "ModelSpec", "OutputSpec", "ParallelSpec", "VaeSpec"]

MAX_RANKS = 4096
_MONTH = 2_592_000


def _degree(help: str) -> Any:
    return about(help, minimum=1, maximum=MAX_RANKS)


def _seconds(help: str) -> Any:
    return about(help, minimum=0.1, maximum=_MONTH)


@attrs.frozen
class ModelSpec:
    """`[model]`: what to load."""

    id: str = attrs.field(
        metadata=about(
            "A hub id (`name` or `org/name`), or a folder in diffusers format. A relative folder is one "
            "beside the spec file and comes before a hub id of the same name; `~` is your home folder."
        )
    )
    dtype: str = attrs.field(
        default="bfloat16",
        metadata=about("The type of the weights.", choices=("bfloat16", "float16", "float32")),
    )
    revision: str | None = attrs.field(
        default=None,
        metadata=about(
            "A branch, tag or commit on the hub; the default is `main`.",
            # It becomes part of a path in the hub's cache.
            pattern=r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._/-]{0,250}",
            form="letters, digits and . _ - /, without '..'",
        ),
    )
    variant: str | None = attrs.field(
        default=None,
        metadata=about(
            "Load the weight files of this variant, as in `fp16`.",
            pattern="[A-Za-z0-9_-]{1,60}",
            form="letters, digits, _ and -",
        ),
    )
    local_files_only: bool = attrs.field(
        default=False, metadata=about("Use what is in the hub's cache and ask the network for nothing.")
    )
    device: str = attrs.field(
        default="auto",
        metadata=about(
            "Where ranks compute; `auto` is `cuda` if it is there.", choices=("auto", "cuda", "cpu")
        ),
    )
    offload: str = attrs.field(
        default="none",
        metadata=about(
            "`stages` keeps text encoders, transformer and VAE on the device only while a stage uses them, "
            "and on the CPU in between.",
            choices=("none", "stages"),
        ),
    )
    compile: str = attrs.field(
        default="off",
        metadata=about(
            "Compiles the transformer's blocks with this backend of torch.compile; `inductor` is the fast "
            "one, the others help to find faults. Works together with every dimension.",
            choices=("off", "inductor", "aot_eager", "eager"),
        ),
    )
    lora: tuple[Adapter, ...] = attrs.field(
        default=(),
        metadata=about(
            "LoRA adapters that are fused into the transformer, in order: safetensors files, as in "
            '`["style.safetensors"]`, or tables, as in `{path = "style.safetensors", weight = 0.8}`.'
        ),
    )

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id; loading a spec makes a local folder's path absolute."""
        return Path(self.id) if Path(self.id).is_absolute() else None


@attrs.frozen
class ParallelSpec:
    """`[parallel]`: how ranks are spread. The product of all sizes but the last is the number of ranks."""

    data_parallel_size: int = attrs.field(
        default=1, metadata=_degree("Groups of ranks that each make other images.")
    )
    cfg_parallel_size: int = attrs.field(
        default=1, metadata=_degree("Ranks that share the guided and the unguided pass.")
    )
    ulysses_degree: int = attrs.field(
        default=1, metadata=_degree("Ranks that split the sequence and exchange attention heads.")
    )
    ring_degree: int = attrs.field(
        default=1, metadata=_degree("Ranks that split the sequence and pass keys and values around.")
    )
    pipeline_parallel_size: int = attrs.field(default=1, metadata=_degree("Ranks that split the layers."))
    tensor_parallel_size: int = attrs.field(
        default=1, metadata=_degree("Ranks that split every layer; must divide its heads and widths.")
    )
    vae_patch_parallel_size: int = attrs.field(
        default=1, metadata=_degree("How many of the ranks share the VAE's work; adds no rank.")
    )

    @property
    def dims(self) -> ParallelDims:
        """The six dimensions of the DiT group."""
        return ParallelDims(
            data=self.data_parallel_size,
            cfg=self.cfg_parallel_size,
            pipeline=self.pipeline_parallel_size,
            ring=self.ring_degree,
            ulysses=self.ulysses_degree,
            tensor=self.tensor_parallel_size,
        )


@attrs.frozen
class VaeSpec:
    """`[vae]`: how the VAE works, alone and over ranks."""

    vae_use_tiling: bool | None = attrs.field(
        default=None,
        metadata=about(
            "Whether the VAE works tile by tile. Left out, the model's own setting holds; VAE patch "
            "parallelism switches it on where its strategy works on tiles, and says so."
        ),
    )
    vae_use_slicing: bool = attrs.field(
        default=False, metadata=about("Whether the VAE works on one image of a batch at a time.")
    )
    strategy: str = attrs.field(
        default="auto",
        metadata=about("How the VAE's work is cut: `auto`, or the name of a registered strategy."),
    )
    output: str = attrs.field(
        default="rank0",
        metadata=about("Which ranks the pictures land on.", choices=("rank0", "all", "sharded")),
    )
    options: Mapping[str, Any] = attrs.field(
        factory=dict, metadata=about("Options of the named strategy; each strategy lists its own.")
    )
    on_oom: str = attrs.field(
        default="step_down",
        metadata=about(
            "Where a rank's memory is not enough for the VAE's work: all ranks step down together to a "
            "lighter plan, or fail.",
            choices=("step_down", "fail"),
        ),
    )


@attrs.frozen
class OutputSpec:
    """`[output]`: where pictures are saved. Without this table only `vaepp-run` saves, to its default."""

    dir: str = attrs.field(
        default="out",
        metadata=about("The folder, made if it is missing; a relative one is beside the spec file."),
    )
    overwrite: bool = attrs.field(
        default=False, metadata=about("Whether a picture may replace a file of the same name.")
    )
    keep_latents: bool = attrs.field(
        default=False,
        metadata=about(
            "Whether a run's latents stay in `run-N` beside its pictures. Where something fails after "
            "`denoise` they stay in any case."
        ),
    )
    allow_nonfinite: bool = attrs.field(
        default=False,
        metadata=about(
            "Whether latents and pictures with values that are not finite (NaN or Inf) are warned of and "
            "not refused."
        ),
    )
    fps: int | None = attrs.field(
        default=None,
        metadata=about("Frames a second of saved clips; left out, the family's own.", minimum=1, maximum=240),
    )


@attrs.frozen
class LimitsSpec:
    """`[limits]`: the longest waits, in seconds. A wait that ends ends the run, with the ranks named."""

    boot: float = attrs.field(default=600.0, metadata=_seconds("Until every rank has started and joined."))
    load: float = attrs.field(
        default=3600.0, metadata=_seconds("For loading the model, and for the first step of a stage.")
    )
    denoise: float = attrs.field(
        default=60.0,
        metadata=_seconds(
            "Without a step on any rank in `denoise`; 20 usual steps where that is more. The default is "
            "`exchange` where `model.compile` is on: later steps too may compile."
        ),
    )
    decode: float = attrs.field(
        default=120.0,
        metadata=_seconds("The same in `decode`, whose steps are tiles, or exchanges between bands of rows."),
    )
    request: float = attrs.field(default=86400.0, metadata=_seconds("For one request, from prompt to saved."))
    exchange: float = attrs.field(
        default=600.0,
        metadata=_seconds("For one exchange between ranks; more than the slowest step, and than a decode."),
    )
