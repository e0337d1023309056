"""What `python -m build.verify` is made of: the family that is asked, its references, and how they compare."""
