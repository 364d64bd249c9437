"""An example of a plugin for vaepp, as a package of its own."""
