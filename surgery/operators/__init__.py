"""Operators, one family per folder and one file per method; families do not import one another."""
