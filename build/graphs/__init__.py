"""ONNX graphs written directly from a checkpoint's weights, one file per architecture or head."""
