"""Operators that set weights to zero: one file a method, the pure function first."""
