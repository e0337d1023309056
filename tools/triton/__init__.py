"""The embedded Triton: the server out of its wheel, its processes, and what makes the wheel's parts fit."""
