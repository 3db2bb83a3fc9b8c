"""One file an architecture family: how to build it, and where its units live."""
