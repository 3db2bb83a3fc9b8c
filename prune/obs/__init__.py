"""Optimal brain surgeon over units: what is lost when units go and their consumer is refitted."""
