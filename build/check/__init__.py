"""The check of a family: every graph runs once on this machine's CPU before it is served."""
