"""What of a checkpoint becomes a family: its Triton models, their graphs and their configurations."""
