"""Runs a plan with one process per stage: each holds its part of the weights, and runs its part of every forward."""
