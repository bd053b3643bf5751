"""The measurements of `reproduce.py`, with the figures that the papers have published."""
