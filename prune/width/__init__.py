"""Removing neurons of MLPs by the weights that make them: scores, how many stay, and the method."""
