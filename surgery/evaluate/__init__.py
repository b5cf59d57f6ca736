"""Evaluation of checkpoints loaded through the stream."""
