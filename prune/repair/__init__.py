"""What makes up for units that go: other ones in their place, biases, weights or gates refitted on calibration data."""
