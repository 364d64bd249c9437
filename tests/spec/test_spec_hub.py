"""Models from the hub's cache: the real hub client, no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils._paths import filter_repo_objects
from spec_models import NO_WEIGHTS, PIPELINE, model_folder, stand_in_registry

from vaepp_sdk.errors import SpecError
from vaepp_sdk.resolve import resolve
from vaepp_sdk.spec import PipelineSpec

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REGISTRY = stand_in_registry()


def hub_spec(*overrides: str) -> PipelineSpec:
    return PipelineSpec.load({"model": {"id": "org/name"}}, overrides)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return model_folder(repository / "snapshots" / COMMIT)


def test_the_cache_serves_a_hub_id(cache: Path) -> None:
    found = resolve(hub_spec("model.local_files_only=true"), REGISTRY)
    assert (found.model_path, found.pipeline_class) == (cache, PIPELINE)


def test_what_the_cache_lacks_is_one_sentence(cache: Path) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(hub_spec("model.id=org/other", "model.local_files_only=true"), REGISTRY)
    (fault,) = caught.value.faults
    assert fault.path == "$.model.id"
    assert fault.found.startswith('the hub cannot give "org/other" (')
    assert fault.fix == "fetch the model while online, or give the path of a local folder"
    assert str(fault).isprintable()


class Hub:
    """Notes what is asked for; answers from a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **asked: Any) -> str:
        self.asked.append({"id": repo_id, **asked})
        return str(self.folder)

    def fetched(self, call: int, names: list[str]) -> list[str]:
        allow, ignore = self.asked[call]["allow_patterns"], self.asked[call]["ignore_patterns"]
        return list(filter_repo_objects(names, allow_patterns=allow, ignore_patterns=ignore))


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(cache)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


FILES = [
    "README.md",
    "model_index.json",
    "transformer/config.json",
    "transformer/model-00001-of-00002.safetensors",
    "transformer/model.fp16.safetensors",
    "transformer/model.fp16-00001-of-00002.safetensors",
    "transformer/model.bin",
    "vae/config.json",
    "vae/model.safetensors",
    "vae/code.py",
    "safety_checker/model.safetensors",
    "everything.safetensors",
]


def test_only_what_the_pipeline_needs_is_fetched(hub: Hub) -> None:
    resolve(hub_spec("model.revision=v1"), REGISTRY)
    assert [asked["revision"] for asked in hub.asked] == ["v1", "v1"]
    assert hub.fetched(0, FILES) == ["model_index.json", "transformer/config.json", "vae/config.json"]
    needed = ["model_index.json", "transformer/config.json", "transformer/model-00001-of-00002.safetensors"]
    assert hub.fetched(1, FILES) == [*needed, "vae/config.json", "vae/model.safetensors"]


def test_a_variant_is_fetched_where_it_is_asked_for(hub: Hub) -> None:
    with pytest.raises(SpecError, match=r"model\.variant: the model has no safetensors files of \"fp16\""):
        resolve(hub_spec("model.variant=fp16"), REGISTRY)
    assert "transformer/model.fp16.safetensors" in hub.fetched(1, FILES)
    (hub.folder / "transformer" / "model.fp16.safetensors").write_bytes(NO_WEIGHTS)
    resolve(hub_spec("model.variant=fp16"), REGISTRY)


def test_faults_come_before_the_weights(hub: Hub) -> None:
    with pytest.raises(SpecError, match="sizes that work: 2, 5, 10"):
        resolve(hub_spec("parallel.tensor_parallel_size=4"), REGISTRY)
    assert len(hub.asked) == 1


def test_any_failure_of_the_hub_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RuntimeError("first line\x1b[31m\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SpecError) as caught:
        resolve(hub_spec(), REGISTRY)
    assert "RuntimeError: first line\\u001b[31m)" in str(caught.value)
    assert "second line" not in str(caught.value)
