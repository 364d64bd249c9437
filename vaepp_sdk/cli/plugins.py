"""`vaepp-run --plugins`: what is installed, and what it registers."""

from __future__ import annotations

import json

import attrs

from vaepp_sdk.registry import default_registry

__all__ = ["list_plugins"]


def list_plugins() -> int:
    """Print plugins, strategies with their promises, VAE classes, allowlist and DiT dimensions as JSON."""
    registry = default_registry()
    found = {
        "plugins": [attrs.asdict(plugin) for plugin in registry.plugins],
        "strategies": {name: entry.promise for name, entry in sorted(registry.strategies.items())},
        "vaes": {name: list(entry.strategies) for name, entry in sorted(registry.vaes.items())},
        "allowlist": {name: list(registry.pipelines[name].strategies) for name in registry.allowlist},
        "dimensions": {
            name: list(entry.dit.axes) for name, entry in sorted(registry.pipelines.items()) if entry.dit
        },
    }
    print(json.dumps(found, indent=2))
    return 0
