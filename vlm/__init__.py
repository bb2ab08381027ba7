"""Knows models: what is behind a name or a folder, and the code of those that transformers lacks."""
