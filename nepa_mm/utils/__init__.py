"""Helpers shared by all subpackages. They import nothing else from nepa_mm."""
