"""What MODEL stands for: a folder, a catalogue name or a hub id, and from it the graph and counts of a workload.

Torch-free. An existing path wins over the catalogue, and that over the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from planner.errors import SourceError, UnsupportedModelError
from planner.graph import ModuleGraph
from planner.polynomial import Quantities
from planner.workload import Workload
from vlm.catalogue import lookup
from vlm.checkpoint import (
    Checkpoint,
    checkpoint_in,
    has_weights,
    read_checkpoint,
    read_json,
)
from vlm.cost_library import CostLibrary
from vlm.families import FAMILIES
from vlm.internlm_xcomposer2 import planned
from vlm.internlm_xcomposer2_hd import facts as tiled
from vlm.traced import TracedModel, Tracer


class Model(Protocol):
    """A model that can be planned. `checkpoint` is None where there are no weights: a catalogue name, a bare config."""

    @property
    def name(self) -> str: ...
    @property
    def origin(self) -> Literal["folder", "catalogue", "hub"]: ...
    @property
    def architecture(self) -> str: ...
    @property
    def default_dtype(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def checkpoint(self) -> Checkpoint | None: ...

    @property
    def code(self) -> Path | None:
        """The folder of the model's own code, where that may be run."""

    @property
    def has_images(self) -> bool:
        """Whether the model sees."""

    @property
    def fixed_image_px(self) -> tuple[int, int] | None:
        """Width and height that every picture is resized to; None where any size will do."""

    @property
    def max_positions(self) -> int | None:
        """The context that the model was made for."""

    @property
    def fingerprint(self) -> str:
        """Equal for any two sources of the same architecture at the same size."""

    def resolved(self, workload: Workload) -> Workload:
        """`workload` with every "auto" and default decided for this model.

        Raises: ConstraintError when `max_model_len` is shorter than the request.
        """

    def quantities(self, workload: Workload) -> Quantities:
        """The counts of a resolved workload."""

    def graph(self, workload: Workload) -> ModuleGraph:
        """The module graph in the dtypes and attention of a resolved workload."""


Fetch = Callable[[str], Checkpoint]
"""Reads the config and weight headers of a model on the hub, by its id."""


def find_model(
    name_or_path: str,
    find_costs: Tracer | None = None,
    fetch: Fetch | None = None,
    *,
    to_load: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """The model that MODEL stands for: an existing path, else a name of the catalogue, else an id on the hub.

    `find_costs` answers for architectures whose graph is not written down; without it only costs that ship are known.
    Without `fetch` nothing is looked up on the hub. A model `to_load` needs weights, which the catalogue has none of:
    an id of the hub then wins over it. `trust_remote_code` lets the code in a folder be run, for architectures that
    have no class here; what comes from the hub says itself whether its code may.
    Raises: SourceError for an unknown name or a folder that cannot be read; UnsupportedModelError for a config that
    names no architecture.
    """
    find_costs = find_costs or CostLibrary().find
    path = path_of(name_or_path)
    if path is not None:
        return _from_folder(path, find_costs, trust_remote_code=trust_remote_code)
    if name_or_path.startswith((".", "/", "~")):
        raise SourceError(f"there is no folder {name_or_path}: check the path, or give a name from the catalogue")
    on_hub = fetch if "/" in name_or_path else None
    if on_hub and to_load:
        return _from_hub(name_or_path, on_hub, find_costs)
    try:
        entry = lookup(name_or_path)
    except SourceError:
        if on_hub is None:
            raise
        return _from_hub(name_or_path, on_hub, find_costs)
    name = name_or_path.strip().lower().rpartition("/")[2]
    architecture = entry.config["architectures"][0]
    if architecture in planned.ARCHITECTURES:
        return planned.catalogued(name, entry.config, entry.dtype)
    return TracedModel(
        name=name,
        origin="catalogue",
        architecture=architecture,
        default_dtype=entry.dtype,
        config=entry.config,
        find_costs=find_costs,
        catalogue_stem=entry.like or entry.name,
    )


def path_of(name_or_path: str) -> Path | None:
    """MODEL as a path where there is one; a name that is no possible path is not."""
    try:
        path = Path(name_or_path).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _from_folder(folder: Path, find_costs: Tracer, *, trust_remote_code: bool) -> Model:
    checkpoint = checkpoint_in(folder) if folder.is_file() or has_weights(folder) else None
    config = checkpoint.config if checkpoint else read_json(folder / "config.json")
    if checkpoint and checkpoint.pickles and _architecture(config, checkpoint, folder) in planned.ARCHITECTURES:
        # Compared with the config by their headers, which pickles do not have: reading them as safetensors says so.
        checkpoint = read_checkpoint(folder)
    model = _model_of(config, checkpoint, folder.resolve(), "folder", find_costs)
    return replace(model, code=folder) if trust_remote_code and isinstance(model, TracedModel) else model


def _from_hub(repo_id: str, fetch: Fetch, find_costs: Tracer) -> Model:
    checkpoint = fetch(repo_id)
    if checkpoint.pickles and _architecture(checkpoint.config, checkpoint, Path(repo_id)) in planned.ARCHITECTURES:
        raise SourceError(
            f"{repo_id} has pickled weights, whose headers cannot be compared with its config: download it, and turn "
            "them into safetensors with plan-devices convert"
        )
    model = _model_of(checkpoint.config, checkpoint, Path(repo_id), "hub", find_costs)
    return replace(model, code=checkpoint.code) if isinstance(model, TracedModel) else model


def _model_of(
    config: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    folder: Path,
    origin: Literal["folder", "hub"],
    find_costs: Tracer,
) -> Model:
    """The model that a config describes, and the weights where there are any."""
    where = folder / "config.json"
    architecture = _architecture(config, checkpoint, where)
    if checkpoint and tiled.is_tiled(checkpoint.tensors):
        shapes = {name: header.shape for name, header in checkpoint.tensors.items()}
        config = tiled.completed(config, shapes, str(where))
        architecture = config["architectures"][0]
    elif checkpoint and architecture in planned.ARCHITECTURES:
        return replace(planned.from_checkpoint(checkpoint, architecture), origin=origin, name=folder.name)
    return TracedModel(
        name=folder.name,
        origin=origin,
        architecture=architecture,
        default_dtype=_stored_dtype(config, checkpoint, architecture),
        config=config,
        find_costs=find_costs,
        checkpoint=checkpoint,
    )


def _stored_dtype(config: Mapping[str, Any], checkpoint: Checkpoint | None, architecture: str) -> str:
    """What most weights are stored in, else what the config says, where that is a 16-bit dtype; else the family's."""
    stored = (checkpoint and checkpoint.dtype) or str(config.get("dtype") or config.get("torch_dtype"))
    family = FAMILIES.get(architecture)
    return stored if stored in ("float16", "bfloat16") else family.dtype if family else "bfloat16"


def _architecture(config: Mapping[str, Any], checkpoint: Checkpoint | None, where: Path) -> str:
    """The architecture that the config names, else the one that the weights' names show, else that of its type."""
    named = config.get("architectures") or []
    if not isinstance(named, list):
        raise SourceError(f"{where}: architectures is {named!r}, not a list of class names")
    if named:
        return str(named[0])
    shown = planned.architecture_of_layout(checkpoint.tensors) if checkpoint else None
    if shown or isinstance(config.get("model_type"), str):
        return shown or ""
    raise UnsupportedModelError(
        f"{where} has no architectures, no model_type, and weights of no known layout: nothing says what model it is"
    )
