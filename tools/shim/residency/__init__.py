"""Which families are in Triton's memory: what there is, what is loaded, and the rules of who goes."""
