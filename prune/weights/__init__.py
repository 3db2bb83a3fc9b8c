"""Weight sparsity: one file a method, and the walk through the blocks that they share."""
