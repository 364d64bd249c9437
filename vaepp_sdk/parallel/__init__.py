"""Dimensions, the DiT group, and the VAE's view of it."""
