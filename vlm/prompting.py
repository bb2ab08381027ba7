"""Questions with pictures -> a model's inputs, and its answer's ids -> text: our processors, or the checkpoint's own.

A checkpoint's processor comes from transformers. Where it cannot be made for want of torchvision, which is needed for
videos alone, it is made without its video part. Pictures go where the question says `<ImageHere>`, or in front.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from planner.errors import ConstraintError, SourceError, UnsupportedModelError
from vlm.chat import IMAGE_PLACEHOLDER
from vlm.families import FAMILIES
from vlm.image_pixels import ImageInput, as_rgb
from vlm.processors import load_processor

_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, IndexError)
"""What processors raise for a question that they do not take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One prompt and its pictures, in the order of their placeholders.

    Raises: ConstraintError for an empty prompt, or numbers of pictures and placeholders that differ.
    """

    prompt: str
    images: tuple[ImageInput, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.replace(IMAGE_PLACEHOLDER, "").strip():
            raise ConstraintError("the prompt is empty: it needs some text")
        named = self.prompt.count(IMAGE_PLACEHOLDER)
        if named not in (0, len(self.images)):
            raise ConstraintError(
                f"the prompt has {named} {IMAGE_PLACEHOLDER} and came with {len(self.images)} pictures: write one for "
                "each picture, or none, which puts them all in front"
            )

    @property
    def marked(self) -> str:
        """The prompt with a placeholder for every picture."""
        return self.prompt if IMAGE_PLACEHOLDER in self.prompt else IMAGE_PLACEHOLDER * len(self.images) + self.prompt


class Prompter(Protocol):
    """How questions become inputs, and answers text. `stop_ids` end an answer beside what the model itself says."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """A forward's keyword arguments, prompts padded on the left.

        Raises: ConstraintError for a question that the model does not take; SourceError for a picture that cannot be
        read.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of an answer's ids."""


def prompter_for(
    folder: Path, architecture: str, config: Mapping[str, Any] | None = None, *, trust_remote_code: bool = False
) -> Prompter:
    """The prompter of a checkpoint, by its config.json or the `config` of the model that was found there.

    `trust_remote_code` runs the code of a processor or tokenizer that lies in the folder.

    Raises: SourceError when its processor's files are missing or damaged; UnsupportedModelError when the processor
    needs a package that is not there.
    """
    if architecture in FAMILIES:
        return OurPrompter(load_processor(folder, config))
    return CheckpointPrompter(_processor(folder, trust_remote_code=trust_remote_code), folder)


class OurPrompter:
    """Asks a processor of ours."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return tuple(self._processor.tokenizer.stop_ids)

    def inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Raises: ConstraintError, SourceError."""
        try:
            return dict(self._processor([q.marked for q in questions], [list(q.images) for q in questions]))
        except ValueError as problem:
            raise ConstraintError(str(problem)) from problem

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode(ids))


class CheckpointPrompter:
    """Asks the processor that a checkpoint brings, or its tokenizer where it is a language model."""

    def __init__(self, processor: Any, folder: Path) -> None:
        self._processor = processor
        self._folder = folder
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return ()

    def inputs(self, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
        """Raises: ConstraintError, SourceError."""
        images = [[as_rgb(image) for image in question.images] for question in questions]
        options: dict[str, Any] = {"return_tensors": "pt", "padding": len(questions) > 1}
        if any(images):
            self._refuse_pictures_without_eyes()
            options["images"] = images if any(len(some) != 1 for some in images) else [some[0] for some in images]
        try:
            texts = [self._text(question) for question in questions]
            found = self._processor(text=texts, **options)
        except _REFUSALS as problem:
            raise ConstraintError(
                f"the processor in {self._folder} does not take this question: {type(problem).__name__}: {problem}"
            ) from problem
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _text(self, question: Question) -> str:
        """The question as the checkpoint's chat template writes it, else as it is after its image tokens."""
        template = getattr(self._processor, "chat_template", None) or self._tokenizer.chat_template
        if template:
            messages = [{"role": "user", "content": _content(question)}]
            return str(
                self._processor.apply_chat_template(
                    messages, chat_template=template, add_generation_prompt=True, tokenize=False
                )
            )
        token = getattr(self._processor, "image_token", None) or ""
        return question.marked.replace(IMAGE_PLACEHOLDER, str(token))

    def _refuse_pictures_without_eyes(self) -> None:
        if self._processor is self._tokenizer:
            raise ConstraintError(f"the model in {self._folder} takes no pictures: leave them out")


def _content(question: Question) -> list[dict[str, str]] | str:
    """A message's content as chat templates read it: plain text where there is no picture."""
    if not question.images:
        return question.prompt
    texts = question.marked.split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, str]] = []
    for index, text in enumerate(texts):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts


def _processor(folder: Path, *, trust_remote_code: bool) -> Any:
    """The folder's processor, complete or without its video part; its tokenizer where it has none."""
    verbosity = transformers_logging.get_verbosity()
    # It warns that pictures are processed by Pillow, which is what is wanted here.
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except ImportError as problem:
        processor_class = _processor_class(folder)
        if processor_class is None:
            raise UnsupportedModelError(
                f"the processor in {folder} needs what is not here: {_first(problem)}"
            ) from problem
        return _without_video(processor_class, folder)
    except (OSError, *_REFUSALS) as problem:
        raise SourceError(f"no processor or tokenizer can be made of {folder}: {_first(problem)}") from problem
    finally:
        transformers_logging.set_verbosity(verbosity)


def _processor_class(folder: Path) -> type[ProcessorMixin] | None:
    """The class of a folder's processor where it takes a video part; None for any other."""
    config, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    name = PROCESSOR_MAPPING_NAMES.get(config.get("model_type"), "")
    found = getattr(transformers, name, None)
    try:
        return found if found is not None and "video_processor" in found.get_attributes() else None
    except ImportError:
        return None


def _without_video(processor_class: type[ProcessorMixin], folder: Path) -> ProcessorMixin:
    """The processor with Pillow's image processor and None for what works on videos and sounds.

    Raises: SourceError when the image processor's or tokenizer's files are missing or damaged.
    """

    def accept_absent(self: ProcessorMixin, name: str, part: Any) -> Any:
        return type(None) if part is None else processor_class.check_argument_for_proper_class(self, name, part)

    images_only = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": accept_absent})
    made = {
        "tokenizer": lambda: AutoTokenizer.from_pretrained(folder),
        "image_processor": lambda: AutoImageProcessor.from_pretrained(folder, backend="pil"),
    }
    try:
        settings, _ = processor_class.get_processor_dict(folder)
        parts = [made[name]() if name in made else None for name in processor_class.get_attributes()]
        return images_only.from_args_and_dict(parts, settings)
    except ImportError as problem:
        raise UnsupportedModelError(f"the processor in {folder} needs what is not here: {_first(problem)}") from problem
    except (OSError, *_REFUSALS) as problem:
        raise SourceError(f"no processor can be made of {folder}: {_first(problem)}") from problem


def _first(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0][:300]
