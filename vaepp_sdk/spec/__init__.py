"""The pipeline spec: classes, strict loading, overrides and the editor schema. Imports no torch."""

from __future__ import annotations

from vaepp_sdk.spec.classes import LimitsSpec, ModelSpec, OutputSpec, ParallelSpec, VaeSpec
from vaepp_sdk.spec.pipeline_spec import PipelineSpec

__all__ = ["LimitsSpec", "ModelSpec", "OutputSpec", "ParallelSpec", "PipelineSpec", "VaeSpec"]
