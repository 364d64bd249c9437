"""vaepp: VAE decode and encode over the ranks that already run the diffusion transformer.

Names that need torch are imported at first use, so that a spec can be checked without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vaepp_sdk.entries import (
    BatchPlan,
    CallsPlan,
    ChainPlan,
    DiTPlan,
    Option,
    PipelineEntry,
    PipelinePlan,
    Rung,
    SequencePlan,
    SizeRule,
    StrategyEntry,
    TensorPlan,
    VaeEntry,
)
from vaepp_sdk.errors import (
    AgreementError,
    OutputError,
    PeerError,
    PluginError,
    RankError,
    RequestError,
    RunError,
    SpecError,
    UnsupportedError,
    UserError,
    VaeppError,
    VaeppWarning,
)
from vaepp_sdk.markers import hookimpl

if TYPE_CHECKING:
    from vaepp_sdk.pipeline import Pipeline, Result
    from vaepp_sdk.spec import PipelineSpec
    from vaepp_sdk.vae.api import parallelize_vae

__all__ = [
    "AgreementError",
    "BatchPlan",
    "CallsPlan",
    "ChainPlan",
    "DiTPlan",
    "Option",
    "OutputError",
    "PeerError",
    "Pipeline",
    "PipelineEntry",
    "PipelinePlan",
    "PipelineSpec",
    "PluginError",
    "RankError",
    "RequestError",
    "Result",
    "RunError",
    "Rung",
    "SequencePlan",
    "SizeRule",
    "SpecError",
    "StrategyEntry",
    "TensorPlan",
    "UnsupportedError",
    "UserError",
    "VaeEntry",
    "VaeppError",
    "VaeppWarning",
    "__version__",
    "hookimpl",
    "parallelize_vae",
]

__version__ = "0.1.0"

_LAZY = {
    "Pipeline": "vaepp_sdk.pipeline",
    "PipelineSpec": "vaepp_sdk.spec",
    "Result": "vaepp_sdk.pipeline",
    "parallelize_vae": "vaepp_sdk.vae.api",
}


if not TYPE_CHECKING:  # a type checker would take every name for one that is there

    def __getattr__(name: str) -> Any:
        """Import a lazy name."""
        if name in _LAZY:
            return getattr(importlib.import_module(_LAZY[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Lazy names too, for those who look for what there is."""
        return sorted({*globals(), *_LAZY})
