"""How much of a ratio units give, and how much tokens: read off what each does to the answers alone."""
