"""The command line: the composition root, and the only place that may import everything, late and per command."""
