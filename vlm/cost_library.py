"""Where the costs of traced models are kept: with the catalogue, in the user's cache, or found anew by a tracer.

Files that ship answer any batch, number of images and length; files of the cache are for one kind of workload.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from planner.cost_file import graph_from_dict, graph_to_dict
from planner.errors import NoClassError, UnsupportedModelError
from planner.textfile import write_atomically
from planner.workload import ITEMSIZE, Workload
from vlm.by_names.costs import costs_by_names
from vlm.image_rule import ImageRule
from vlm.internlm_xcomposer2_hd.tiling import Tiling
from vlm.traced import TracedCosts, TracedModel, Tracer, costs_key
from vlm.versions import installed_versions

FORMAT = "plan-devices-costs/1"
COUNTING = 4
"""Version of what a trace counts; costs kept by another one are traced anew."""
SHIPPED = Path(__file__).with_name("graphs")


@dataclass(frozen=True)
class CostLibrary:
    """Costs by model and kind of workload. `folder` is the cache, `tracer` finds what is nowhere; both may be None.

    `extrapolating` takes what ships for batches and numbers of images beyond those traced, too: a search tries many.
    """

    folder: Path | None = None
    tracer: Tracer | None = None
    extrapolating: bool = False
    _known: dict[tuple[str, str], TracedCosts] = field(default_factory=dict)

    def find(self, model: TracedModel, workload: Workload) -> TracedCosts:
        """The costs of `model` under a workload with its dtype decided.

        A checkpoint without a class is judged by the names of its weights.
        Raises: UnsupportedModelError where nobody knows them and there is no tracer; whatever the tracer raises.
        """
        key = (model.config_digest, costs_key(workload))
        if key not in self._known:
            self._known[key] = self._found(model, workload)
        return self._known[key]

    def _found(self, model: TracedModel, workload: Workload) -> TracedCosts:
        shipped = _shipped_costs(model, workload)
        known_to = self.extrapolating or self.tracer is None
        if shipped is not None and (known_to or _answers(shipped, workload)):
            return shipped
        path = self._path(model, workload)
        cached = _read(path) if path else None
        if cached is not None:
            return cached
        if self.tracer is None:
            raise UnsupportedModelError(
                f"{model.name} has no costs on file for {costs_key(workload)}. They come from a trace, which the "
                "command makes where torch is installed: pip install 'plan-devices[torch]'"
            )
        try:
            costs = self.tracer(model, workload)
        except NoClassError as problem:
            if model.checkpoint is None or not model.checkpoint.tensors:
                raise
            return costs_by_names(model, model.checkpoint, workload, problem)
        if path:
            _keep(path, costs)
        return costs

    def _path(self, model: TracedModel, workload: Workload) -> Path | None:
        """The cache file: another version of what was traced, of its counting or of this format, is another file."""
        if self.folder is None:
            return None
        counted = [FORMAT, COUNTING, installed_versions()]
        question = [*counted, model.config_digest, model.architecture, costs_key(workload)]
        digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.json"


def _costs_to(costs: TracedCosts) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "versions": costs.versions,
        "fingerprint": costs.fingerprint,
        "max_positions": costs.max_positions,
        "image": asdict(costs.image) if costs.image else None,
        "graph": graph_to_dict(costs.graph),
    }


def _costs_from(content: Mapping[str, Any]) -> TracedCosts:
    """The inverse of `_costs_to`. Raises: KeyError, TypeError or ValueError for another format or a damaged file."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}: this version reads {FORMAT}")
    image = content["image"]
    return TracedCosts(
        graph=graph_from_dict(content["graph"]),
        image=image and _rule_from(image),
        fingerprint=content["fingerprint"],
        max_positions=content["max_positions"],
        versions=content["versions"],
    )


def _rule_from(content: Mapping[str, Any]) -> ImageRule:
    tiling = content.get("tiling")
    typed = {"native_px": tuple(content["native_px"]), "tiling": tiling and Tiling(**tiling)}
    return ImageRule(**{**content, **typed})


def variant(workload: Workload) -> str:
    """The kinds of run between which a model takes different ways; sizes vary within one."""
    images = "images" if workload.num_images else "text only"
    samples = "batch" if workload.batch_size > 1 else "one sequence"
    ties = ", ties apart" if workload.replicate_tied else ""
    return f"{images}, {samples}, {workload.attention}, {ITEMSIZE[workload.dtype]} bytes{ties}"


def shipped_path(stem: str) -> Path:
    """The file of a catalogue entry's costs, by kind of workload."""
    return SHIPPED / f"{stem}.json.gz"


def read_shipped(stem: str) -> Mapping[str, TracedCosts]:
    """A catalogue entry's costs by variant; none where no file ships."""
    path = shipped_path(stem)
    if not path.exists():
        return {}
    content = json.loads(gzip.decompress(path.read_bytes()))
    return {name: _costs_from(costs) for name, costs in content.items()}


def write_shipped(stem: str, costs: Mapping[str, TracedCosts]) -> None:
    """Replace a catalogue entry's file; equal costs give equal bytes."""
    text = json.dumps({name: _costs_to(one) for name, one in costs.items()}, separators=(",", ":"))
    shipped_path(stem).write_bytes(gzip.compress(text.encode(), mtime=0))


def _shipped_costs(model: TracedModel, workload: Workload) -> TracedCosts | None:
    """Costs that ship for a catalogue entry and this kind of workload and size of picture."""
    costs = _shipped(model.catalogue_stem).get(variant(workload)) if model.catalogue_stem else None
    if costs is None or (costs.image and costs.image.counts(workload.image_size, workload.num_images) is None):
        return None
    return costs


_shipped = cache(read_shipped)


def _answers(costs: TracedCosts, workload: Workload) -> bool:
    """Whether batch and images lie within what was traced; lengths beyond it are said to be extrapolated."""
    counts = {"batch": workload.batch_size, "images": workload.num_images}
    return all(one.low <= counts[one.variable] <= one.high for one in costs.graph.valid if one.variable in counts)


def _read(path: Path) -> TracedCosts | None:
    """A cached file's costs; one that is missing or damaged is as good as none."""
    try:
        return _costs_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _keep(path: Path, costs: TracedCosts) -> None:
    """Write a cache file; where that is not possible, the next run traces anew."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(_costs_to(costs), separators=(",", ":")))
