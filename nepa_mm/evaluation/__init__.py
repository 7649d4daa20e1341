"""Frozen-feature scores, and a stricter IoUMetric."""
