"""`python -m vaepp_sdk.cli` is `vaepp-run`."""

from vaepp_sdk.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
