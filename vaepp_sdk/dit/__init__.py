"""Parallel forms of the diffusion transformer, and loading only a rank's own weights."""
