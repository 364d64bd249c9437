"""Tools for testing strategies and pipelines: real ranks in a test, and live bytes counted.

Shipped for plugin authors; nothing in the SDK's runtime uses it.
"""

from vaepp_sdk.testing.ranks import RankFailedError, run_ranks
from vaepp_sdk.vae.live_bytes import LiveBytes

__all__ = ["LiveBytes", "RankFailedError", "run_ranks"]
