"""`python -m vaepp_sdk.cli` is `vaepp-run`."""

import os

from vaepp_sdk.runtime.inplace import end_with_launcher

if __name__ == "__main__":
    if "RANK" in os.environ:
        end_with_launcher()  # before the rest is imported: a launcher may be killed while its ranks start
    from vaepp_sdk.cli.main import entry_point

    entry_point()
