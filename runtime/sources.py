"""What `load_sharded` is given, as a model whose weights are on this disk: a hub id is downloaded for that."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from planner.errors import SourceError
from runtime.costs import trace_costs
from vlm.checkpoint import Checkpoint
from vlm.cost_library import CostLibrary
from vlm.hub import Hub, is_repo_id
from vlm.model import Model, find_model, path_of


def model_with_weights(source: str | Path | Model, hub: Hub) -> tuple[Model, Checkpoint]:
    """The model and its checkpoint on this disk; a model that `find_model` found keeps the costs it was found with.

    Raises: SourceError for a catalogue name or a folder without weights, and as `find_model` and `Hub.download` do.
    """
    if isinstance(source, str | Path):
        model = downloaded(str(source), hub, _find)
    elif source.origin == "hub" and source.checkpoint is not None and not source.checkpoint.folder.exists():
        folder = hub.download(source.checkpoint.folder.as_posix())
        model = replace(source, checkpoint=_find(str(folder)).checkpoint)
    else:
        model = source
    if model.checkpoint is not None:
        return model, model.checkpoint
    if model.origin == "catalogue":
        raise SourceError(
            f"{model.name} is a name in the catalogue: loading needs a folder that holds its weights, or its id on the "
            "hub, such as organisation/name"
        )
    raise SourceError(
        f"{source if isinstance(source, str | Path) else model.name} holds a config and no weights: loading needs "
        "model.safetensors, shards with their index, or pytorch_model*.bin beside it"
    )


def downloaded(name: str, hub: Hub, find: Callable[[str], Model]) -> Model:
    """The model of a path or name, by `find`; one that only the hub has is downloaded first. An existing path wins."""
    if path_of(name) is not None or name.startswith(".") or not is_repo_id(name):
        return find(name)
    # The snapshot's folder is called after its commit.
    return replace(find(str(hub.download(name))), name=name.partition("/")[2], origin="hub")


def _find(name: str) -> Model:
    return find_model(name, CostLibrary(_cache_folder(), trace_costs).find)


def _cache_folder() -> Path:
    """Where costs are kept between runs, as for the command line."""
    chosen = os.environ.get("PLAN_DEVICES_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "plan-devices"
