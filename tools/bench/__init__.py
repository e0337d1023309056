"""Measures the stack against the raw engine on the same texts."""
