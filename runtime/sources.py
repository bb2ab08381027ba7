"""What `load_sharded` is given, as a model whose weights are on this disk: a hub id is downloaded for that."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from planner.errors import SourceError
from runtime.costs import trace_costs
from vlm.checkpoint import Checkpoint
from vlm.cost_library import CostLibrary
from vlm.hub import Hub, is_repo_id
from vlm.model import Model, find_model, path_of


def model_with_weights(source: str | Path | Model, hub: Hub) -> tuple[Model, Checkpoint]:
    """The model and its checkpoint on this disk; an existing path wins over the hub.

    A model that `find_model` found keeps the costs it was found with.
    Raises: SourceError for a catalogue name or a folder without weights, and as `find_model` and `Hub.download` do.
    """
    if isinstance(source, str | Path):
        model = find_model(str(_folder(str(source), hub)), CostLibrary(_cache_folder(), trace_costs).find)
    elif source.origin == "hub" and source.checkpoint is not None:
        folder = hub.download(source.checkpoint.folder.as_posix())
        model = replace(source, checkpoint=find_model(str(folder)).checkpoint)
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
        f"{source} holds a config and no weights: loading needs model.safetensors, shards with their index, or "
        "pytorch_model*.bin beside it"
    )


def _folder(source: str, hub: Hub) -> str | Path:
    """The source itself, or the folder that a hub id has been downloaded to."""
    if path_of(source) is not None or not is_repo_id(source) or source.startswith((".", "~")):
        return source
    return hub.download(source)


def _cache_folder() -> Path:
    """Where costs are kept between runs, as for the command line."""
    chosen = os.environ.get("PLAN_DEVICES_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "plan-devices"
