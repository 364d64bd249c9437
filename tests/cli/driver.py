"""`vaepp-run` with ranks that work without a model; run as a script."""

import vaepp_sdk.pipeline
from vaepp_sdk.cli.main import entry_point

vaepp_sdk.pipeline._TARGET = "runtime.stand_ins:Painter"
entry_point()
