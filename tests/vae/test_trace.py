"""What a trace of layers says, and that it leaves the VAE alone."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from torch import nn
from vae_models import tiny_kl

from vaepp_sdk.vae.trace import INPUT, UNKNOWN, LayerTrace, trace_layers


def trace(model: nn.Module, channels: int = 4) -> LayerTrace:
    return trace_layers(model, model, (1, channels, 8, 8))


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.down = Downsample2D(4, use_conv=True, padding=0, name="conv")
        self.norm = nn.BatchNorm2d(4)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.down(self.second(self.first(value))))
        return result


def test_every_tensor_of_the_model_stays_what_it_was() -> None:
    model = Tied().eval()
    before = {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    trace(model)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, value in after.items():
        identity, copy = before[name]
        assert id(value) == identity, name
        assert torch.equal(value, copy), name
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_raises_stays_what_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(5, 4, 1))
    weight = model[0].weight
    with pytest.raises(RuntimeError):
        trace(model)
    assert model[0].weight is weight
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.gate = nn.Conv2d(4, 6, 1), nn.SiLU(), nn.ReLU()
        self.second, self.third = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.act(self.first(value))
        other = self.second(value)
        value.mul_(2)
        result: torch.Tensor = self.third(value) + self.gate(other + 1)
        return result


def test_sources_name_the_layer_whose_output_is_read_unchanged() -> None:
    calls = trace(Mixed()).calls
    index = {call.name: place for place, call in enumerate(calls)}
    sources = {call.name: call.source for call in calls}
    assert sources["first"] == INPUT
    assert sources["act"] == index["first"]
    assert sources["second"] == index["act"]
    assert sources["third"] == UNKNOWN  # written to in place since
    assert sources["gate"] == UNKNOWN  # made by an addition
    assert calls[0].operators == ("add", "mul_")
    assert [call.inside for call in calls] == [-1, 0, 0, 0, 0, 0]


class Nested(nn.Module):
    """Holds most before it calls its layers, of which one does nothing but call another."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.act = nn.Sequential(nn.Conv2d(4, 4, 1)), nn.SiLU()

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = torch.cat([value] * 8).mean(0, keepdim=True)
        result: torch.Tensor = self.act(self.outer(value))
        return result


def test_of_nested_calls_the_innermost_is_the_source_and_each_has_its_own_peak() -> None:
    found = trace(Nested())
    calls = {call.name: call for call in found.calls}
    assert found.calls[calls["act"].source].name == "outer.0"
    values = 4 * 8 * 8
    assert found.peak == found.calls[0].peak == 9 * values  # eight copies, and their mean
    assert [calls[name].peak for name in ("outer", "act")] == [2 * values, 3 * values]


def test_a_decode_is_listed_with_shapes_and_settings() -> None:
    vae = tiny_kl()
    found = trace_layers(vae, vae.decoder, (1, 16, 8, 8))
    first = next(call for call in found.calls if call.name == "decoder.conv_in")
    assert (first.kind, first.in_shape, first.out_shape) == ("Conv2d", (1, 16, 8, 8), (1, 8, 8, 8))
    assert (first.setting("kernel_size"), first.setting("absent", 3)) == ((3, 3), 3)
    assert first.operators == ("convolution",)
    assert found.calls[0].out_shape == (1, 3, 64, 64)
    assert hash(found) == hash(trace_layers(vae, vae.decoder, (1, 16, 8, 8)))


def test_tracing_in_inference_mode_sees_writes_in_place() -> None:
    with torch.inference_mode():
        found = trace(Mixed())
    assert found == trace(Mixed())
