"""Questions or conversations, and images -> the keyword arguments of our InternLM2 and InternLM-XComposer2 models.

An image takes one position per patch: every `<ImageHere>` becomes that many copies of the image token id, where the
model puts the features of the next image. It loads no weights and runs no code of the model's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image

from planner.errors import SourceError
from vlm.checkpoint import read_json
from vlm.internlm_xcomposer2.chat import IMAGE_PLACEHOLDER, Message, chat_messages, chat_prompt, with_image_in_front
from vlm.internlm_xcomposer2.facts import InternLM2Facts
from vlm.internlm_xcomposer2.image_processing import ImageInput, pixel_values
from vlm.internlm_xcomposer2.tokenization import InternLM2Tokenizer
from vlm.model import find_model

# The piece whose positions images take when config.json does not name another: no text can contain it by accident.
IMAGE_PIECE = "[UNUSED_TOKEN_0]"

Conversation = str | Sequence[Message]
Images = ImageInput | Sequence[ImageInput] | None


class XComposer2Processor:
    """Tokenizer, image size and image token id of one model; `img_size` None is a text-only model."""

    def __init__(
        self,
        tokenizer: InternLM2Tokenizer,
        *,
        img_size: int | None,
        patch_size: int = 14,
        image_token_id: int | None = None,
    ) -> None:
        if img_size is not None and (img_size < patch_size or img_size % patch_size):
            raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
        self.tokenizer = tokenizer
        self.img_size = img_size
        self.num_image_tokens = 0 if img_size is None else (img_size // patch_size) ** 2
        self.image_token_id = tokenizer.id_of(IMAGE_PIECE) if image_token_id is None else image_token_id
        if self.image_token_id is None and img_size is not None:
            raise ValueError(f"no image_token_id: none was given and the tokenizer has no piece {IMAGE_PIECE}")

    @classmethod
    def from_folder(cls, path: str | Path) -> XComposer2Processor:
        """The processor of a model folder, from its config.json and tokenizer.model.

        Raises: SourceError when either is missing, unreadable or contradicts the other.
        """
        file = Path(path) / "config.json"
        config = read_json(file)
        # Where the config names no class, the weights' names decide, as they do for planning.
        facts = (
            InternLM2Facts.from_config(config, str(file)) if "architectures" in config else find_model(str(path)).facts
        )
        tokenizer = InternLM2Tokenizer.from_folder(path)
        if tokenizer.vocab_size > facts.vocab_size:
            raise SourceError(
                f"{path}: tokenizer.model has {tokenizer.vocab_size} pieces, but vocab_size in config.json is "
                f"{facts.vocab_size}: ids would lie outside the embedding. Take both files from the same repository"
            )
        if facts.vision is None:
            return cls(tokenizer, img_size=None)
        image_token_id = config.get("image_token_id", tokenizer.id_of(IMAGE_PIECE))
        if type(image_token_id) is not int or not 0 <= image_token_id < facts.vocab_size:
            raise SourceError(
                f"{file}: image_token_id is {image_token_id!r}; it must be an id below vocab_size {facts.vocab_size}"
            )
        vision = facts.vision
        return cls(tokenizer, img_size=vision.image_size, patch_size=vision.patch_size, image_token_id=image_token_id)

    def __call__(
        self,
        prompts: Conversation | Sequence[Conversation],
        images: Images | Sequence[Images] = None,
        *,
        chat: bool = True,
    ) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask` (B, T), left-padded, and `pixel_values` (images, 3, S, S) if there are any.

        One question or conversation, with its image or images in the order of their placeholders; or a list of them,
        with a list of as many entries (each None, an image or several). A single image without a placeholder goes in
        front of the first user text. `chat=False` takes texts as they are, without turns.
        Raises: ValueError for an empty prompt, numbers of images and placeholders that differ, or an image for a
                text-only model.
        """
        batch, images_per_prompt = _as_batch(prompts, images)
        texts = [_prompt_text(prompt, len(given), chat) for prompt, given in zip(batch, images_per_prompt, strict=True)]
        self._refuse_wrong_counts(texts, images_per_prompt)
        rows = [self._ids(text) for text in texts]
        num_positions = max(map(len, rows))
        padding = [num_positions - len(row) for row in rows]
        padded = [[self.tokenizer.pad_id] * pad + row for pad, row in zip(padding, rows, strict=True)]
        mask = [[0] * pad + [1] * (num_positions - pad) for pad in padding]
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        flat = [image for given in images_per_prompt for image in given]
        if flat and self.img_size is not None:
            inputs["pixel_values"] = torch.cat([pixel_values(image, img_size=self.img_size) for image in flat])
        return inputs

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer's ids, up to the end of the turn; the prompt's ids must have been cut off before."""
        answer: list[int] = []
        for token_id in map(int, ids):
            if token_id in self.tokenizer.stop_ids:
                break
            answer.append(token_id)
        return self.tokenizer.decode(answer)

    def _ids(self, text: str) -> list[int]:
        parts = text.split(IMAGE_PLACEHOLDER)
        ids = self.tokenizer.encode(parts[0])
        self._refuse_image_id(ids)
        for part in parts[1:]:
            following = self.tokenizer.encode(part, add_bos=False, continued=True)
            self._refuse_image_id(following)
            ids += [cast(int, self.image_token_id)] * self.num_image_tokens + following
        return ids

    def _refuse_image_id(self, text_ids: list[int]) -> None:
        """An image's id that came from text would claim a position for which there is no image."""
        if self.img_size is not None and self.image_token_id in text_ids:
            raise ValueError(
                f"a prompt's text contains the image token (id {self.image_token_id}, {IMAGE_PIECE}): "
                f"remove it, and write {IMAGE_PLACEHOLDER} where an image belongs"
            )

    def _refuse_wrong_counts(self, texts: list[str], images_per_prompt: list[list[ImageInput]]) -> None:
        num_images = sum(map(len, images_per_prompt))
        if self.img_size is None and num_images:
            raise ValueError(f"{num_images} image(s) were given, but this is a text-only model: leave images out")
        wrong = [
            f"prompt {index} has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} and {len(given)} image(s)"
            for index, (text, given) in enumerate(zip(texts, images_per_prompt, strict=True))
            if text.count(IMAGE_PLACEHOLDER) != len(given)
        ]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}: every image needs one placeholder, in order")


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


def _prompt_text(prompt: Conversation, num_images: int, chat: bool) -> str:
    """The text to encode, its turns written out, with a placeholder for a lone image that had none."""
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("a prompt is empty: it needs some text")
    if not chat:
        if not isinstance(prompt, str):
            raise ValueError(f"chat=False takes texts, not {len(prompt)} messages: join them into one text first")
        return IMAGE_PLACEHOLDER + prompt if num_images == 1 and IMAGE_PLACEHOLDER not in prompt else prompt
    messages = chat_messages(prompt) if isinstance(prompt, str) else prompt
    text = chat_prompt(messages)
    if num_images == 1 and IMAGE_PLACEHOLDER not in text:
        return chat_prompt(with_image_in_front(messages))
    return text
