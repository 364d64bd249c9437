"""Reading what a pipeline's call takes, from source that is never imported."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from vaepp_sdk.errors import PluginError
from vaepp_sdk.signature import CallSignature, pipeline_source, read_signature, signature_faults

SOURCE = """
raise RuntimeError("imported")

class Base:
    def __call__(
        self,
        prompt: str | list[str] = None,
        count: int = 3,
        scale: float = 5.0,
        flag: bool = False,
        sizes: Optional[Union[int, List[int]]] = None,
        pair: tuple[int, int] = (0, 0),
        sigmas: "list[float] | None" = None,
        free=None,
        whatever: typing.Any = 1,
        latents: torch.FloatTensor | None = None,
        embeds: list[torch.Tensor] | None = None,
        extra: dict[str, Any] | None = None,
        step: Callable[[int], None] | None = None,
        image: torch.Tensor | str = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        *,
        needed: str,
        **kwargs,
    ):
        pass

class Middle(Base):
    other = 1

class Leaf(Middle, Mixin):
    pass

class Painted(ZImagePipeline):
    pass

class Odd(package.Base):
    pass

class Circle(Circle):
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "vaepp_test_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text('raise RuntimeError("imported")')
    (package / "inner" / "pipes.py").write_text(SOURCE)
    (package / "broken.py").write_text("def (")
    monkeypatch.syspath_prepend(tmp_path)
    return "vaepp_test_package.inner.pipes"


def read(name: str, module: str | None = None) -> CallSignature:
    source = pipeline_source(name, module)
    assert source is not None
    signature = read_signature(name, source)
    assert signature is not None
    return signature


GOOD: dict[str, list[Any]] = {
    "prompt": ["a", ["a", "b"], None],
    "count": [None, 1],
    "scale": [1.5, 1],
    "flag": [True],
    "sizes": [1, [1, 2], None],
    "pair": [[1, 2]],
    "sigmas": [[1, 0.5], None],
    "free": [1, "a", [1, "a"], True, None],
    "whatever": [1, "a"],
    "image": ["a.png"],
    "seed": [3],
    "needed": ["x"],
}
BAD: dict[str, list[Any]] = {
    "prompt": [1, [1], True],
    "count": [1.0, "1", True],
    "scale": ["1.5", False, [1.0]],
    "flag": [1, 0, "true"],
    "sizes": [1.5, ["1"], True],
    "pair": [1, ["a"]],
    "sigmas": [1.0, ["a"], [True]],
    "image": [3],
    "latents": [1, [1.0], None],
    "embeds": [[1.0]],
    "extra": [1],
    "step": [1],
    "generator": [1],
    "output_type": ["latent"],
    "cont": [1],
    "kwargs": [1],
}


@pytest.mark.parametrize("name", ["Base", "Leaf"])
def test_arguments_are_checked_against_the_annotations(name: str, module: str) -> None:
    signature = read(name, module)
    assert signature.owner == name
    for key, values in GOOD.items():
        for value in values:
            assert signature_faults(signature, {key: value}) == [], (key, value)
    for key, values in BAD.items():
        for value in values:
            assert [fault.path for fault in signature_faults(signature, {key: value})] == [f"$.call.{key}"]
    assert [name for name, parameter in signature.parameters.items() if parameter.required] == ["needed"]


def test_the_faults_say_what_would_work(module: str) -> None:
    faults = signature_faults(
        read("Base", module), {"cuont": 1, "generator": 1, "latents": 1, "sigmas": ["a"], "output_type": "np"}
    )
    assert [str(fault) for fault in faults] == [
        "$.call.cuont: Base takes no such argument; did you mean 'count'?",
        "$.call.generator: vaepp sets this itself; write seed = 7 instead",
        "$.call.latents: it takes an object that no spec can write; leave it out",
        "$.call.sigmas: found a list of 1; it must be a list, each item a number",
        "$.call.output_type: vaepp sets this itself; leave it out",
    ]


def test_a_call_inherited_from_diffusers_is_found(module: str) -> None:
    assert read("Painted", module).parameters == read("ZImagePipeline").parameters


@pytest.mark.parametrize("name", ["Odd", "Circle", "NoSuch"])
def test_a_call_that_cannot_be_told(name: str, module: str) -> None:
    source = pipeline_source(name, module)
    assert source is not None
    assert read_signature(name, source) is None


def test_what_cannot_be_found() -> None:
    assert pipeline_source("NoSuchPipeline") is None
    assert pipeline_source("X", "no_such_package.inner") is None
    assert pipeline_source("X", "diffusers.no_such_module") is None


def test_a_broken_module_is_named(module: str) -> None:
    source = pipeline_source("X", "vaepp_test_package.broken")
    assert source is not None
    with pytest.raises(PluginError, match=r"broken\.py.*not Python"):
        read_signature("X", source)


@pytest.mark.parametrize(
    "name",
    ["ZImagePipeline", "FluxPipeline", "Flux2KleinPipeline", "WanPipeline", "StableDiffusionXLPipeline"],
)
def test_real_pipelines(name: str) -> None:
    """The signature read from source is the one that Python would give."""
    import diffusers  # takes seconds, and only this test needs it

    signature = read(name)
    real = dict(list(inspect.signature(getattr(diffusers, name).__call__).parameters.items())[1:])
    named = {key: value for key, value in real.items() if value.kind is not value.VAR_KEYWORD}
    assert list(signature.parameters) == list(named)
    for key, parameter in signature.parameters.items():
        assert parameter.required == (named[key].default is inspect.Parameter.empty)
    good = {"prompt": ["a"], "height": 512, "num_inference_steps": 4, "guidance_scale": 0}
    assert signature_faults(signature, good) == []
    assert signature.parameters["latents"].kind is None
    assert not any(argument.endswith("_embeds") for argument in signature.writable), "they are tensors"
    assert "prompt" in signature.writable
