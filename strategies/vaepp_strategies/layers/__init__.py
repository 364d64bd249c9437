"""Layers that look at a whole picture, made to work on parts of it held by several ranks."""
