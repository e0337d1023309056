"""TensorRT plans: what compiles them, and what says where they may be loaded."""
