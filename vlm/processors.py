"""A model folder of ours -> its processor, whichever family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from planner.errors import UnsupportedModelError
from vlm.checkpoint import has_weights, read_checkpoint, read_json
from vlm.families import FAMILIES
from vlm.internlm_xcomposer2_hd.facts import ARCHITECTURE, is_tiled
from vlm.processing import Processor

_XCOMPOSER2 = "InternLMXComposer2ForCausalLM"


def load_processor(folder: str | Path, config: Mapping[str, Any] | None = None) -> Processor:
    """The processor for the model in `folder`, from its tokenizer and config.json, or the `config` of a found model.

    With the latter no weight has to be there.
    Raises: SourceError when a file is missing, unreadable or contradicts another; UnsupportedModelError for an
    architecture that is not ours: transformers' AutoProcessor knows those.
    """
    path = Path(folder)
    file = path / "config.json"
    named = (config or read_json(file)).get("architectures")
    architecture = named[0] if isinstance(named, list) and named else _XCOMPOSER2
    # XComposer2 and those for tiled images name one architecture: the weights tell them apart.
    if config is None and architecture == _XCOMPOSER2 and has_weights(path) and is_tiled(read_checkpoint(path).tensors):
        architecture = ARCHITECTURE
    family = FAMILIES.get(architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{file} names {architecture!r}, for which there is no processor here: known are {', '.join(FAMILIES)}. "
            "Use transformers' AutoProcessor"
        )
    processor_class = getattr(import_module(f"{family.package}.processing"), family.processor_class)
    processor: Processor = processor_class.from_folder(folder, config)
    return processor
