"""Layers that work on a part of a picture and ask other ranks for the rest."""
