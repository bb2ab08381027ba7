"""Runs anyone's device map on virtual GPUs, and says what breaks, why, and the smallest repair."""
