"""Removing whole blocks: how much each one changes what flows through it, and the method."""
