"""Operators that store weights in few bits: one file a method, the pure function first."""
