"""One file a way to recover: train what is left after the cut."""
