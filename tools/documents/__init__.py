"""A client that reads documents: docling, with its models on a Triton."""
