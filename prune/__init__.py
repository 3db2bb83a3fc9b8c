"""Scores, plans, search and surgery: the heart. No file here names an architecture."""
