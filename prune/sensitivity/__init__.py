"""How much each layer minds losing a part: measured curves, and what follows from them for a budget."""
