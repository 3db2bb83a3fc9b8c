"""One file a ranker: pure maths, and the class that a configuration names."""
