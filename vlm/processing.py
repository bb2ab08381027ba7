"""Questions or conversations, and images -> the keyword arguments of a forward: what every model of ours does alike.

An image takes the positions that its features will: every `<ImageHere>` becomes that many copies of an id, where the
model puts the features of the next image. It loads no weights and runs no code of a model's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from PIL import Image
from transformers import PreTrainedConfig

from planner.errors import SourceError
from vlm.chat import IMAGE_PLACEHOLDER, ChatFormat, Message, chat_messages
from vlm.image_pixels import ImageInput

Config = TypeVar("Config", bound=PreTrainedConfig)
Conversation = str | Sequence[Message]
Images = ImageInput | Sequence[ImageInput] | None


class Tokenizer(Protocol):
    """What a processor asks of a tokenizer. `stop_ids` end an answer."""

    @property
    def pad_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str, add_bos: bool = True, *, continued: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedImage:
    """An image as the model takes it: pixels (rows, 3, S, S), one row or one per tile, and the ids of its positions.

    `tiles` are the rows and columns of its tiles, none for an image that is not cut.
    """

    pixels: torch.Tensor
    ids: Sequence[int]
    tiles: tuple[int, int] | None = None


class Processor:
    """A tokenizer, a way to write conversations, and a way to prepare images; the latter two are each model's own."""

    chat: ClassVar[ChatFormat]

    def __init__(self, tokenizer: Tokenizer, *, image_ids: frozenset[int]) -> None:
        """`image_ids` are those that text may not contain, as the model would look for an image; none: text only."""
        self.tokenizer = tokenizer
        self.image_ids = image_ids

    def __call__(
        self,
        prompts: Conversation | Sequence[Conversation],
        images: Images | Sequence[Images] = None,
        *,
        chat: bool = True,
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T), left-padded, and `pixel_values` (rows, 3, S, S) if there are images.

        One question or conversation, with its image or images in the order of their placeholders; or a list of them,
        with a list of as many entries (each None, an image or several). A single image without a placeholder goes in
        front of the first user text. `chat=False` takes texts as they are, without turns.
        Raises: ValueError for an empty prompt, numbers of images and placeholders that differ, or an image for a
                text-only model.
        """
        batch, images_per_prompt = _as_batch(prompts, images)
        texts = [self._text(prompt, len(given), chat) for prompt, given in zip(batch, images_per_prompt, strict=True)]
        self._refuse_wrong_counts(texts, images_per_prompt)
        prepared = [[self._prepared(image, len(given)) for image in given] for given in images_per_prompt]
        rows = [self._ids(text, given) for text, given in zip(texts, prepared, strict=True)]
        inputs = left_padded(rows, self.tokenizer.pad_id)
        flat = [image for given in prepared for image in given]
        if flat:
            inputs["pixel_values"] = torch.cat([image.pixels for image in flat])
        if any(image.tiles for image in flat):
            inputs["image_tiles"] = torch.tensor([image.tiles for image in flat])
        return inputs

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer's ids, up to the end of the turn; the prompt's ids must have been cut off before."""
        answer: list[int] = []
        for token_id in map(int, ids):
            if token_id in self.tokenizer.stop_ids:
                break
            answer.append(token_id)
        return self.tokenizer.decode(answer)

    def _prepared(self, image: ImageInput, num_images: int) -> PreparedImage:
        """One of `num_images` in a prompt."""
        raise NotImplementedError

    def _text(self, prompt: Conversation, num_images: int, chat: bool) -> str:
        """The text to encode, its turns written out, with a placeholder for a lone image that had none."""
        text = self._written(prompt, chat)
        if num_images != 1 or IMAGE_PLACEHOLDER in text:
            return text
        if not chat:
            return IMAGE_PLACEHOLDER + text
        return self.chat.prompt(
            self.chat.with_image_in_front(chat_messages(prompt) if isinstance(prompt, str) else prompt)
        )

    def _written(self, prompt: Conversation, chat: bool) -> str:
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError("a prompt is empty: it needs some text")
        if chat:
            return self.chat.prompt(chat_messages(prompt) if isinstance(prompt, str) else prompt)
        if not isinstance(prompt, str):
            raise ValueError(f"chat=False takes texts, not {len(prompt)} messages: join them into one text first")
        return prompt

    def _ids(self, text: str, images: Sequence[PreparedImage]) -> list[int]:
        parts = text.split(IMAGE_PLACEHOLDER)
        ids = self._text_ids(self.tokenizer.encode(parts[0]))
        for image, part in zip(images, parts[1:], strict=True):
            ids += [*image.ids, *self._text_ids(self.tokenizer.encode(part, add_bos=False, continued=True))]
        return ids

    def _text_ids(self, ids: list[int]) -> list[int]:
        """The ids, when none of them would claim a position for which there is no image."""
        claimed = self.image_ids.intersection(ids)
        if claimed:
            raise ValueError(
                f"a prompt's text contains the image token (id {min(claimed)}, "
                f"{self.tokenizer.decode([min(claimed)], skip_special_tokens=False)}): "
                f"remove it, and write {IMAGE_PLACEHOLDER} where an image belongs"
            )
        return ids

    def _refuse_wrong_counts(self, texts: list[str], images_per_prompt: list[list[ImageInput]]) -> None:
        num_images = sum(map(len, images_per_prompt))
        if not self.image_ids and num_images:
            raise ValueError(f"{num_images} image(s) were given, but this is a text-only model: leave images out")
        wrong = [
            f"prompt {index} has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} and {len(given)} image(s)"
            for index, (text, given) in enumerate(zip(texts, images_per_prompt, strict=True))
            if text.count(IMAGE_PLACEHOLDER) != len(given)
        ]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: every image needs one placeholder, in order")


def config_from(config_class: type[Config], values: Mapping[str, Any], file: Path) -> Config:
    """The configuration that a file's values make.

    Raises: SourceError naming the file and every key that is wrong.
    """
    try:
        return config_class.from_dict(dict(values))
    except ValueError as error:
        raise SourceError(f"{file}: {error}") from error


def refuse_other_tokenizer(num_ids: int, vocab_size: int, key: str, folder: str | Path) -> None:
    """Raise SourceError when a tokenizer has ids that the config's `key` leaves no room for."""
    if num_ids > vocab_size:
        raise SourceError(
            f"{folder}: the tokenizer has {num_ids} ids, but {key} in config.json is {vocab_size}: ids would lie "
            "outside the embedding. Take both files from the same repository"
        )


def left_padded(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` (B, T) of prompts of unequal lengths."""
    num_positions = max(map(len, rows))
    padding = [num_positions - len(row) for row in rows]
    padded = [[pad_id] * pad + list(row) for pad, row in zip(padding, rows, strict=True)]
    mask = [[0] * pad + [1] * (num_positions - pad) for pad in padding]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def _as_batch(
    prompts: Conversation | Sequence[Conversation], images: Images | Sequence[Images]
) -> tuple[list[Conversation], list[list[ImageInput]]]:
    """The prompts as a list, and for each the list of its images."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], Mapping)):
        return [cast(Conversation, prompts)], [_image_list(cast(Images, images))]
    if not prompts:
        raise ValueError("no prompts: give a text, a list of messages, or a list of either")
    batch = list(cast(Sequence[Conversation], prompts))
    if images is None:
        return batch, [[] for _ in batch]
    if isinstance(images, str | Path | Image.Image) or len(images) != len(batch):
        given = f"a list of {len(images)}" if isinstance(images, list | tuple) else "one image"
        raise ValueError(
            f"{len(batch)} prompts came with {given} for images: give a list of {len(batch)} entries, each None, "
            "an image or a list of images"
        )
    return batch, [_image_list(entry) for entry in images]


def _image_list(images: Images) -> list[ImageInput]:
    if images is None:
        return []
    return [images] if isinstance(images, str | Path | Image.Image) else list(images)
