"""Stored forms of tensors: one file per form, pure functions on bytes, no I/O."""
