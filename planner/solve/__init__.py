"""Solvers: each file is one method, and all answer a Problem with a Solution."""
