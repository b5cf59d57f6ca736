"""Merging: several checkpoints of one architecture become one."""
