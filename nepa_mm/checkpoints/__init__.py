"""Read checkpoints safely, convert them, and load them into a network."""
