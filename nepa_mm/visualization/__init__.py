"""Inspect what a network does with an image, and draw it."""
