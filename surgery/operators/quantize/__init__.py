"""Quantization: weights that become few bits."""
