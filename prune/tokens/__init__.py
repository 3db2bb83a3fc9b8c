"""Token reduction: schedules, and one file a method.

The mechanism itself is in `models/merging.py` and `models/merging_flow.py`.
"""
