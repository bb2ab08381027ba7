"""Models that nobody here has code for: what the names and shapes of their weights say, and what is assumed beside."""
