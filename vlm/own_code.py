"""A model's own code, run because its user said so: the classes that its config's `auto_map` names.

transformers finds and imports the files, with what they import of their own folder. They run with all rights of the
user; nothing here makes that safe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from planner.errors import SourceError, UnsupportedModelError

MODEL_CLASSES = ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel")
"""Entries of `auto_map` that generate text, the more telling first."""

_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What foreign code raises when it is imported."""


def own_classes(folder: Path, config: Mapping[str, Any]) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The configuration's and the model's class in `folder`.

    Raises: SourceError when the config names none, or code of another place; UnsupportedModelError when the code
    cannot be imported here.
    """
    named = config.get("auto_map")
    entries = named if isinstance(named, Mapping) else {}
    model_entry = next((entries[name] for name in MODEL_CLASSES if name in entries), None)
    if "AutoConfig" not in entries or model_entry is None:
        raise SourceError(
            f"{folder / 'config.json'} names no code to run: auto_map has {', '.join(entries) or 'no entries'}, and "
            f"AutoConfig and one of {', '.join(MODEL_CLASSES)} are needed"
        )
    return _class(folder, entries["AutoConfig"], PreTrainedConfig), _class(folder, model_entry, PreTrainedModel)


def _class(folder: Path, entry: Any, base: type) -> Any:
    where = f"{folder / 'config.json'}: auto_map"
    if not isinstance(entry, str) or entry.count(".") != 1 or "--" in entry:
        raise SourceError(
            f"{where} says {entry!r}: code is run that lies beside the config, as MODULE.CLASS, and none of elsewhere"
        )
    module, _, name = entry.partition(".")
    if not (folder / f"{module}.py").is_file():
        raise SourceError(f"{where} says {entry}, and there is no {module}.py beside it: download the model's code too")
    try:
        found = get_class_from_dynamic_module(entry, folder, local_files_only=True)
    except (ImportError, SyntaxError, *_FAILURES) as problem:
        raise UnsupportedModelError(
            f"{folder / module}.py cannot be run here: {type(problem).__name__}: {problem}. It may be written for "
            "another version of transformers, or need a package that is not installed"
        ) from problem
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UnsupportedModelError(f"{where} says {entry}, and {name} is no {base.__name__}")
    return found
