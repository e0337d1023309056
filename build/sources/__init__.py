"""Checkpoints: where they are obtained, and the files that they are made of, read as data."""
