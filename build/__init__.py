"""Turns a checkpoint into a family of Triton models."""
