"""What needs activations: calibration data, the layer walk, and the statistics taken on it."""
