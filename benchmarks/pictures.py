"""Which model types can be shown pictures without torchvision, as transformers' own tables say. Writes docs/run.md.

python benchmarks/pictures.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

PAGE = Path(__file__).parents[1] / "docs" / "run.md"
KINDS = {
    "whole": "Their processor needs Pillow alone",
    "without video": "Their processor needs torchvision for videos, and is made without that part",
    "torchvision": "Their image processor needs torchvision",
    "undecided": "Transformers names no image processor for the type: the checkpoint's own file decides",
}


def kind(model_type: str) -> str:
    """How a type's pictures are processed where torchvision is missing."""
    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if not backends or model_type not in PROCESSOR_MAPPING_NAMES:
        return "undecided"
    if not backends.get("pil"):
        return "torchvision"
    try:
        attributes = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type]).get_attributes()
    except ImportError:
        return "torchvision"
    return "without video" if "video_processor" in attributes else "whole"


def page() -> str:
    """The text of docs/run.md."""
    return "\n".join([*_introduction(), *_lists(), *_end()])


def _introduction() -> Iterator[str]:
    yield "# Pictures without torchvision"
    yield ""
    yield "transformers' fast image processors need torchvision. Where it is missing, `plan-devices run` and"
    yield "`vlm.prompting` put together what is there: the image processor on Pillow, the tokenizer, and the chat"
    yield "template. Written by `python benchmarks/pictures.py` from the tables of transformers"
    yield f"{transformers.__version__}:"
    yield ""


def _lists() -> Iterator[str]:
    types = sorted(config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for name, title in KINDS.items():
        found = [model_type for model_type in types if kind(model_type) == name]
        yield from textwrap.wrap(f"- *{title} ({len(found)}):* {', '.join(found)}.", 118, subsequent_indent="  ")
    yield ""


def _end() -> Iterator[str]:
    yield "The tests make inputs with one model of each of the first two kinds, llava and qwen2_vl. Our own families"
    yield "(InternLM, XComposer, Qwen, GLM-4V) bring their processors, which need Pillow alone."
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
