"""Sweepers of this project; Hydra finds its plugins in this folder."""
