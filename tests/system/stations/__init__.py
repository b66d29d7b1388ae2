"""Real stations, what may happen to them, and what a listener hears of it."""
