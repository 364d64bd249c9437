"""Imported once by the fork server of `run_ranks`, so that ranks start with it in memory."""

from diffusers.models.autoencoders import autoencoder_kl  # noqa: F401  # imported for its side effect
