"""Configuration check, storage, seeding, records of the environment; nothing about pruning."""
