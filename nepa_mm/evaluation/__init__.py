"""Scores beyond the libraries' own."""
