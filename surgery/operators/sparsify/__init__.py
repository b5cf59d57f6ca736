"""Sparsity: weights that become zero, one by one or n of every m."""
