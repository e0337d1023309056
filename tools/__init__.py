"""Runs and measures the model repository."""
