"""The folder a model is loaded from: a local one, or the hub's cache after fetching what is needed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from vaepp_sdk.errors import Fault, SpecError
from vaepp_sdk.spec import ModelSpec
from vaepp_sdk.text import clean, shown

__all__ = ["ModelFolder", "fetch_weights", "open_model"]

_INDEX = "model_index.json"
_MAX_JSON = 16 << 20
_WANTED = ("json", "txt", "model", "jinja", "safetensors")
# Copies of the same weights in another type, which are only wanted where the spec names a variant.
_VARIANTS = ("fp16", "bf16", "fp32", "ema", "non_ema")


@attrs.frozen
class ModelFolder:
    """A model in diffusers format.

    Attributes:
        path: the folder.
        pipeline_class: the diffusers class that `model_index.json` names.
        components: the sub-folders it is made of.
        settings: what else `model_index.json` says.
    """

    path: Path
    pipeline_class: str
    components: tuple[str, ...]
    settings: Mapping[str, Any] = attrs.field(factory=dict)

    def config(self, component: str) -> Mapping[str, Any]:
        """A component's `config.json`.

        Raises:
            SpecError: it is missing or not JSON.
        """
        return _read_json(self.path / component / "config.json")


def open_model(model: ModelSpec) -> ModelFolder:
    """Find a model's folder and read its index; from the hub only the small files are fetched.

    Raises:
        SpecError: the model cannot be found or is not in diffusers format.
    """
    path = model.folder or _snapshot(model, [_INDEX, "*/config.json"], [])
    if not (path / _INDEX).is_file():
        raise _refused(f"{clean(str(path), 200)} holds no {_INDEX}", "give a model in diffusers format")
    index = _read_json(path / _INDEX)
    name = index.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        found = f"{_INDEX} names {shown(name)} as its pipeline class"
        raise _refused(found, "give a model whose pipeline is a class of diffusers or of a plugin")
    # A component is a pair [library, class]; a pair of nulls is one that this model leaves out.
    pairs = {key: value for key, value in index.items() if isinstance(value, list) and any(value)}
    settings = {key: value for key, value in index.items() if not isinstance(value, list)}
    return ModelFolder(path, name, tuple(pairs), settings)


def fetch_weights(model: ModelSpec, folder: ModelFolder) -> ModelFolder:
    """Fetch the components from the hub, weights in safetensors only.

    Raises:
        SpecError: the hub cannot give them.
    """
    wanted = [_INDEX, *(f"{name}/*.{end}" for name in folder.components for end in _WANTED)]
    skipped = [f"*.{variant}{sep}*" for variant in _VARIANTS for sep in ".-"]
    path = _snapshot(model, wanted, [] if model.variant else skipped)
    return attrs.evolve(folder, path=path)


def _snapshot(model: ModelSpec, wanted: Sequence[str], skipped: Sequence[str]) -> Path:
    # Imported here: it takes as long as everything else together, and a local model never needs it.
    from huggingface_hub import snapshot_download

    try:
        with _bars_for_people():
            path = snapshot_download(
                model.id,
                revision=model.revision,
                local_files_only=model.local_files_only,
                allow_patterns=list(wanted),
                ignore_patterns=list(skipped),
            )
    except Exception as error:
        # The hub client raises its own, its HTTP library's and the system's errors; the user needs one line.
        raise _refused(
            f"the hub cannot give {shown(model.id)} ({_reason(error)})", _hub_fix(model)
        ) from error
    return Path(path)


@contextlib.contextmanager
def _bars_for_people() -> Iterator[None]:
    """No progress bars of the hub client where stderr is a file or a pipe."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return clean(f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}", 200)


def _hub_fix(model: ModelSpec) -> str:
    if model.local_files_only or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return "fetch the model while online, or give the path of a local folder"
    return "check the id, the revision, your network and your login, or give the path of a local folder"


def _read_json(path: Path) -> Mapping[str, Any]:
    shown_path = clean(str(path), 200)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, and a device has no end
            raise _refused(f"{shown_path} is no regular file", "give a complete model folder")
        if path.stat().st_size > _MAX_JSON:
            raise _refused(f"{shown_path} is larger than {_MAX_JSON >> 20} MiB", "give the model's own file")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = clean(error.strerror or "unknown error")
        raise _refused(f"{shown_path} cannot be read ({problem})", "give a complete model folder") from None
    except (ValueError, RecursionError):
        raise _refused(f"{shown_path} is not JSON", "fetch the model again") from None
    if not isinstance(found, dict):
        raise _refused(f"{shown_path} holds no JSON object", "fetch the model again")
    return found


def _refused(found: str, fix: str) -> SpecError:
    return SpecError([Fault("$.model.id", found, fix)])
