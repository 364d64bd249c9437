"""Meets a spec with its model and the registry: what will run, decided once, before any rank starts."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.call_rules import CallRules
from vaepp_sdk.dit_rules import dit_faults, dit_notices
from vaepp_sdk.entries import PipelineEntry
from vaepp_sdk.errors import Fault, PluginError, SpecError
from vaepp_sdk.model_folder import ModelFolder, fetch_weights, open_model
from vaepp_sdk.model_rules import model_faults, model_notices
from vaepp_sdk.parallel.dims import ParallelDims
from vaepp_sdk.registry import Registry
from vaepp_sdk.signature import CallSignature, pipeline_source, read_signature
from vaepp_sdk.size_rules import read_sizes
from vaepp_sdk.spec import LimitsSpec, PipelineSpec, VaeSpec
from vaepp_sdk.spec.prompts import Upcoming
from vaepp_sdk.vae_rules import decide_vae, unfit_faults, vae_faults
from vaepp_sdk.weight_files import adapter_faults, weight_faults

__all__ = ["Resolved", "resolve"]

_MAX_TOLD = 50
"""Faults told of requests to come: a file may hold thousands, all wrong for one reason."""

_FPS = 16
"""Of clips where neither the spec nor an entry says another."""


@attrs.frozen(kw_only=True)
class Resolved:
    """Everything decided before a rank starts.

    Attributes:
        spec: the spec as loaded.
        pipeline_class: the diffusers class, as in `model_index.json`.
        model_path: the folder the model is loaded from.
        entry: the pipeline's entry, or None where no plugin has one.
        dims: the dimensions of the DiT group.
        vae_size: ranks that share the VAE's work; 1 is the plain VAE, untouched.
        use_tiling: whether the VAE's tiling is on; None leaves the model's own setting.
        notices: what the user is told, once, one sentence each.
        clip_rate: frames a second of the video files that clips are saved as; None saves each frame as a
            picture.
        call_rules: what the arguments of a request must fit.
        decode_only: whether latents are there already, so that of the model only the VAE is loaded.
    """

    spec: PipelineSpec
    pipeline_class: str
    model_path: Path
    entry: PipelineEntry | None
    dims: ParallelDims
    vae_size: int
    use_tiling: bool | None
    notices: tuple[str, ...]
    clip_rate: int | None
    # Ranks need only part of it: they are asked for what has been checked.
    call_rules: CallRules = attrs.field(eq=False)
    decode_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold, for handing the decisions to ranks."""
        return {
            "spec": self.spec.to_dict(),
            "pipeline_class": self.pipeline_class,
            "model_path": str(self.model_path),
            "vae_size": self.vae_size,
            "use_tiling": self.use_tiling,
            "notices": list(self.notices),
            "clip_rate": self.clip_rate,
            "decode_only": self.decode_only,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], registry: Registry) -> Resolved:
        """What `to_dict` gave, with the entry of this process's registry; nothing is decided again."""
        spec = PipelineSpec.load(data["spec"])
        entry = registry.pipelines.get(data["pipeline_class"])
        return cls(
            spec=spec,
            pipeline_class=data["pipeline_class"],
            model_path=Path(data["model_path"]),
            entry=entry,
            dims=spec.parallel.dims,
            vae_size=data["vae_size"],
            use_tiling=data["use_tiling"],
            notices=tuple(data["notices"]),
            clip_rate=data["clip_rate"],
            call_rules=_call_rules(spec, data["pipeline_class"], entry),
            decode_only=data["decode_only"],
        )


def resolve(
    spec: PipelineSpec, registry: Registry, *, decode_only: bool = False, upcoming: Upcoming | None = None
) -> Resolved:
    """Decide what will run.

    From the hub the small files come first, so that a fault is told before any weights are fetched.

    Args:
        spec: a loaded spec; it is checked once more, so that one built by hand is as safe.
        registry: the plugins.
        decode_only: latents are there already: the transformer and its adapters are not loaded, and neither
            their sizes nor their files need to fit.
        upcoming: requests to come; they are checked too, as wholes.

    Raises:
        SpecError: with every fault of the spec against its model and the plugins.
        UnsupportedError: the model's own files do not fit its entry.
        PluginError: an entry names a module that is not installed.
    """
    spec = PipelineSpec.load(spec)
    try:
        folder = open_model(spec.model)
        entry = registry.pipelines.get(folder.pipeline_class)
        rules = _call_rules(spec, folder.pipeline_class, entry, None if decode_only else folder)
        dims, size = spec.parallel.dims, spec.parallel.vae_patch_parallel_size
        faults = [] if decode_only else dit_faults(dims, folder, entry, registry)
        wrong = vae_faults(spec.vae, size, entry, registry)
        faults += wrong or unfit_faults(spec.vae, folder, entry, registry)
        faults += model_faults(spec.model, folder.pipeline_class, entry)
        faults += [] if decode_only else adapter_faults(spec.model.lora)
        local = spec.model.folder is not None
        faults += weight_faults(spec.model, folder, entry, decode_only=decode_only) if local else []
        faults += _call_faults(spec, rules)
        if upcoming is not None and not faults:
            faults += _upcoming_faults(upcoming, spec.call, rules)
        if faults:
            raise SpecError(faults)
        if not local:
            folder = fetch_weights(spec.model, folder)
            faults = weight_faults(spec.model, folder, entry, decode_only=decode_only)
        if faults:
            raise SpecError(faults)
    except SpecError as error:
        raise SpecError(error.faults, spec.source) from error.__cause__
    decision = decide_vae(spec.vae, size, dims.dit_parallel_size, folder.pipeline_class, entry, registry)
    return Resolved(
        spec=spec,
        pipeline_class=folder.pipeline_class,
        model_path=folder.path,
        entry=entry,
        dims=dims,
        vae_size=decision.size,
        use_tiling=decision.use_tiling,
        notices=(
            *registry.problems,
            *model_notices(spec.model),
            *_signature_notices(folder.pipeline_class, rules.signature),
            *_whole_notices(spec, folder.pipeline_class, entry),
            *([] if decode_only else dit_notices(dims, spec.call, folder, entry)),
            *_clip_notices(spec, folder.pipeline_class, entry),
            *decision.notices,
        ),
        clip_rate=_clip_rate(spec, entry),
        call_rules=rules,
        decode_only=decode_only,
    )


def _call_rules(
    spec: PipelineSpec, pipeline: str, entry: PipelineEntry | None, folder: ModelFolder | None = None
) -> CallRules:
    """What calls must fit; without a folder not what denoising needs, as where latents are there already."""
    return CallRules(
        pipeline=pipeline,
        entry=entry,
        signature=_signature(pipeline, entry),
        sizes=read_sizes(entry, folder) if folder is not None else (),
        dims=spec.parallel.dims if folder is not None else ParallelDims(),
    )


def _call_faults(spec: PipelineSpec, rules: CallRules) -> list[Fault]:
    """The faults of what the spec writes, each told where it stands."""
    written = {"$.call": spec.call}
    if spec.more_calls:
        calls = (spec.call, *spec.more_calls)
        written = {f"$.call[{index}]": call for index, call in enumerate(calls)}
    return [fault for path, call in written.items() for fault in rules.argument_faults(call, path)]


def _upcoming_faults(upcoming: Upcoming, shared: Mapping[str, Any], rules: CallRules) -> list[Fault]:
    faults = list(upcoming.faults)
    known = {fault.path for fault in faults}
    for call in upcoming.calls:
        found = rules.request_faults({**shared, **call.arguments}, call.path)
        faults += [fault for fault in found if fault.path not in known]
    if len(faults) <= _MAX_TOLD:
        return faults
    more = f"there are {len(faults) - _MAX_TOLD} more faults in the requests"
    return [*faults[:_MAX_TOLD], Fault("$.call", more, "correct these first")]


def _signature(pipeline_class: str, entry: PipelineEntry | None) -> CallSignature | None:
    """What the pipeline's call takes; a pipeline that is nowhere to be found is refused."""
    source = pipeline_source(pipeline_class, entry.module if entry is not None else None)
    if source is not None:
        return read_signature(pipeline_class, source)
    if entry is not None:
        problem = f"its module {entry.module} is not installed; install the package that has it"
        raise PluginError(f"for pipeline {pipeline_class}", problem)
    found = f"its pipeline {pipeline_class} is neither in diffusers {version('diffusers')} nor in a plugin"
    raise SpecError([Fault("$.model.id", found, "install a diffusers or a plugin that has it")])


def _signature_notices(pipeline: str, signature: CallSignature | None) -> list[str]:
    if signature is not None:
        return []
    return [f"[call] is not checked: the source of {pipeline} does not show what its call takes."]


def _whole_notices(spec: PipelineSpec, pipeline: str, entry: PipelineEntry | None) -> list[str]:
    """Settings that matter only where denoising and the VAE's work are stages of their own."""
    keeps = spec.output is not None and spec.output.keep_latents
    named = {"output.keep_latents": keeps, "vae.on_oom": spec.vae.on_oom != VaeSpec().on_oom}
    usual = LimitsSpec()
    for stage in ("denoise", "decode"):
        named[f"limits.{stage}"] = getattr(spec.limits, stage) != getattr(usual, stage)
    keys = [key for key, is_set in named.items() if is_set and entry is None]
    verb = "takes" if len(keys) == 1 else "take"
    reason = f"no plugin runs {pipeline} stage by stage"
    return [f"{', '.join(keys)} {verb} no effect: {reason}."] if keys else []


def _clip_notices(spec: PipelineSpec, pipeline: str, entry: PipelineEntry | None) -> list[str]:
    """What is said of clips that are to be saved; without an entry nobody knows whether there are any."""
    if spec.output is None or entry is None:
        return []
    if entry.fps is None:
        return [f"output.fps takes no effect: {pipeline} makes pictures."] if spec.output.fps else []
    if spec.vae.output == "sharded" and spec.output.fps:
        return ["output.fps takes no effect: pieces of clips are saved as folders of PNG files."]
    if _writes_videos():
        return []
    return ["Clips are saved as folders of PNG files; for video files: pip install 'vaepp-sdk[video]'."]


def _clip_rate(spec: PipelineSpec, entry: PipelineEntry | None) -> int | None:
    wanted = spec.output.fps if spec.output is not None else None
    own = entry.fps if entry is not None else None
    return (wanted or own or _FPS) if _writes_videos() else None


def _writes_videos() -> bool:
    """Whether the packages that encode videos are there."""
    return all(find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))
