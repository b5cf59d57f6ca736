"""Dropping routed experts: criteria that rank them, and the surgery that takes them out."""
