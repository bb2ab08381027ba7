"""What a placed model is called where code reads the attributes that `load_sharded` and `shard` give it."""

from __future__ import annotations

from typing import Any

Placed = Any
"""A model of transformers with `.plan`, `.hf_device_map` and `.input_devices`, which its class does not declare."""
