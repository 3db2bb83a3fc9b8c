"""Token reduction: schedules, and one file a method. The mechanism itself is in `models/merging.py`."""
