"""Triton kernels that attend to packed tokens: they know tensors, not models."""
