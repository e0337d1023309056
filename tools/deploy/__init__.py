"""The stack in containers: `python -m tools.deploy`. Standard library only, so that it runs before any setup."""
