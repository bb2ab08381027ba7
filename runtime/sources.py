"""What `load_sharded` is given: a model known by its config and headers, and later its weights on this disk."""

from __future__ import annotations

import os
from pathlib import Path

from planner.errors import SourceError
from runtime.costs import trace_costs
from vlm.checkpoint import Checkpoint, checkpoint_in
from vlm.cost_library import CostLibrary
from vlm.hub import Hub
from vlm.model import Model, find_model


def model_to_load(source: str | Path | Model, hub: Hub) -> Model:
    """The model in `source`, of which no weight has been read or downloaded; one that is found already stays as it is.

    Raises: SourceError as `find_model` and `Hub.checkpoint` do.
    """
    if not isinstance(source, str | Path):
        return source
    find_costs = CostLibrary(_cache_folder(), trace_costs).find
    return find_model(str(source), find_costs, hub.checkpoint, to_load=True, trust_remote_code=hub.with_code)


def stored_weights(model: Model) -> Checkpoint:
    """The checkpoint that a model was found in, on this disk or the hub.

    Raises: SourceError for a name of the catalogue or a folder without weights.
    """
    if model.checkpoint is not None:
        return model.checkpoint
    if model.origin == "catalogue":
        raise SourceError(
            f"{model.name} is a name in the catalogue: loading needs a folder that holds its weights, or its id on the "
            "hub, such as organisation/name"
        )
    raise SourceError(
        f"{model.name} holds a config and no weights: loading needs model.safetensors, shards with their index, or "
        "pytorch_model*.bin beside it"
    )


def is_remote(checkpoint: Checkpoint) -> bool:
    """Whether only the hub has the weights: such a checkpoint's folder is its id there."""
    return not checkpoint.folder.exists()


def local_checkpoint(checkpoint: Checkpoint, hub: Hub) -> Checkpoint:
    """`checkpoint` with its files on this disk, which are downloaded when only the hub has them.

    Raises: SourceError as `Hub.download` does, or when what was downloaded is no whole checkpoint.
    """
    return checkpoint_in(hub.download(checkpoint.folder.as_posix())) if is_remote(checkpoint) else checkpoint


def small_files(checkpoint: Checkpoint, hub: Hub) -> Path:
    """The folder with everything but the weights: what a tokenizer and a processor need.

    Raises: SourceError as `Hub.small_files` does.
    """
    return hub.small_files(checkpoint.folder.as_posix()) if is_remote(checkpoint) else checkpoint.folder


def _cache_folder() -> Path:
    """Where costs are kept between runs, as for the command line."""
    chosen = os.environ.get("PLAN_DEVICES_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "plan-devices"
