"""ONNX graphs written directly from a checkpoint's weights, one page per architecture or head."""
