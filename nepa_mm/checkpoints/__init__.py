"""Checkpoints of any origin: read safely, converted, loaded into a network."""
