"""Running what the planner decided: devices, real and virtual, tracing, loading and pipelines."""
