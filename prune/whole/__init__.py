"""Pruning with one ranking of everything a model has: single weights, or rows."""
