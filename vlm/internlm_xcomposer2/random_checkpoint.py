"""Small random checkpoints in the official InternLM2 or InternLM-XComposer2 format, tokenizer included, from a seed.

For tests, demonstrations and trying things out: every file has its official name, key and layout, and only sizes and
values are made up. Values depend on the seed and the tensor's name alone, so another shard size, file format or
number of layers changes no tensor that both have.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from planner.errors import SourceError
from vlm.internlm_xcomposer2.facts import InternLM2Facts, Shape
from vlm.internlm_xcomposer2.processing import IMAGE_PIECE
from vlm.internlm_xcomposer2.tokenization import PIECE_OF_NAME, TOKENIZER_FILE, InternLM2Tokenizer

ARCHITECTURES = {"xcomposer2": "InternLMXComposer2ForCausalLM", "internlm2": "InternLM2ForCausalLM"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# File stem and ending of each format, as transformers names them.
FORMATS = {"safetensors": ("model", "safetensors"), "pickle": ("pytorch_model", "bin")}

_NUM_PIECES = 800
_SENTENCES = (
    "A grey cat sleeps on the warm stone wall beside the garden door.",
    "Two children carry a yellow kite along the empty beach at noon.",
    "The old lighthouse stands above the harbour, and its lamp is already on.",
    "Rain falls on the market square, yet the flower seller keeps smiling.",
    "There are three red apples and one green pear in the wooden bowl.",
    "A small boat drifts under the bridge while a dog watches from the bank.",
    "Behind the train station you can see a tower with a round clock.",
    "The picture shows a woman reading a letter near an open window.",
    "Snow covers the roof of the farmhouse, the fence and the sleeping fields.",
    "A bicycle leans against a blue wall under a crooked street sign.",
    "What is the man in the left corner of the photograph holding?",
    "He holds a white umbrella, although the sky is clear and bright.",
    "Please describe the colour and the shape of every object on the table.",
    "The mountain lake mirrors dark trees, pale clouds and a lonely bird.",
    "A baker places fresh bread on the shelf before the shop opens.",
    "How many people are waiting for the bus, and who is the tallest?",
    "Five people are waiting; the tallest wears a long brown coat.",
    "The train to the coast leaves at 7:45 and arrives at 10:20.",
    "An empty chair, a cup of tea and a newspaper wait on the balcony.",
    "Children draw houses, horses and stars with chalk on the pavement.",
    "一只猫坐在窗边看着花园。",
    "桌子上有三个红苹果和一本书。",
    "图片里的人正在做什么？",
    "他们在海边放风筝，天气很好。",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSizes:
    """Sizes of a random model; `vocab_size` 0 is as many as the tokenizer has pieces (more are never generated)."""

    num_layers: int = 4
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    vocab_size: int = 0
    max_positions: int = 2048
    img_size: int = 56
    patch_size: int = 14
    plora_rank: int = 8
    vision_layers: int = 2
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    vision_heads: int = 2


def write_random_checkpoint(
    folder: str | Path,
    *,
    family: str = "xcomposer2",
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = 2**19,
    format: str = "safetensors",
    **sizes: int,
) -> Path:
    """The written folder; `sizes` are the fields of `RandomSizes`.

    Untrained, so answers mean nothing, but they are words: special and byte pieces are never the likeliest token.
    Raises: SourceError when the folder exists, or a size contradicts another; ValueError for an unknown option.
    """
    folder = Path(folder)
    _refuse_unknown(family=(family, ARCHITECTURES), dtype=(dtype, DTYPES), format=(format, FORMATS))
    if folder.exists():
        raise SourceError(f"{folder} exists: nothing is overwritten. Choose another folder or remove it")
    model_bytes = _tokenizer_model()
    tokenizer = InternLM2Tokenizer(model_bytes)
    config = _config(ARCHITECTURES[family], dtype, RandomSizes(**sizes), tokenizer)
    shapes = InternLM2Facts.from_config(config, "the given sizes").tensor_shapes()
    writable, torch_dtype = _writable_ids(model_bytes), DTYPES[dtype]
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", _generation_config(tokenizer))
        (partial / TOKENIZER_FILE).write_bytes(model_bytes)
        shards = _shards(shapes, torch_dtype, max_shard_bytes)
        _write_shards(partial, shards, format, lambda name: _values(name, shapes[name], seed, writable).to(torch_dtype))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _refuse_unknown(**options: tuple[str, Mapping[str, object]]) -> None:
    unknown = [
        f"{name} is {value!r}: known are {', '.join(known)}"
        for name, (value, known) in options.items()
        if value not in known
    ]
    if unknown:
        raise ValueError("; ".join(unknown))


def _tokenizer_model() -> bytes:
    """A byte-pair model of a few hundred pieces: words of the sentences, every byte, and the special pieces in use."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=_NUM_PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[IMAGE_PIECE, *reversed(PIECE_OF_NAME.values())],
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _config(architecture: str, dtype: str, sizes: RandomSizes, tokenizer: InternLM2Tokenizer) -> dict[str, Any]:
    """Content of config.json: the official keys, and for a vision model those that the official code hard-codes."""
    if 0 < sizes.vocab_size < tokenizer.vocab_size:
        raise SourceError(
            f"vocab_size {sizes.vocab_size} is less than the {tokenizer.vocab_size} pieces of the tokenizer: "
            "give more, or 0 for exactly as many"
        )
    config = {
        "architectures": [architecture],
        "model_type": "internlm2",
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "vocab_size": sizes.vocab_size or tokenizer.vocab_size,
        "max_position_embeddings": sizes.max_positions,
        "max_length": sizes.max_positions,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 1.0},
        "bias": False,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return config if architecture == ARCHITECTURES["internlm2"] else {**config, **_vision_config(sizes, tokenizer)}


def _vision_config(sizes: RandomSizes, tokenizer: InternLM2Tokenizer) -> dict[str, Any]:
    return {
        "img_size": sizes.img_size,
        "image_token_id": tokenizer.id_of(IMAGE_PIECE),
        "plora_rank": sizes.plora_rank,
        "plora_alpha": sizes.plora_rank,
        "vision_config": {
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_hidden_layers": sizes.vision_layers,
            "num_attention_heads": sizes.vision_heads,
            "patch_size": sizes.patch_size,
        },
    }


def _generation_config(tokenizer: InternLM2Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }


def _writable_ids(model_bytes: bytes) -> torch.Tensor:
    """Ids that a random model may answer with: not an image position, a turn's end or half a character."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    specials = {IMAGE_PIECE, *PIECE_OF_NAME.values()}
    return torch.tensor(
        [
            token_id
            for token_id in range(processor.get_piece_size())
            if processor.id_to_piece(token_id) not in specials
            and not (processor.is_control(token_id) or processor.is_unknown(token_id) or processor.is_byte(token_id))
        ]
    )


def _shards(shapes: Mapping[str, Shape], dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Names per shard, in order; a tensor larger than a shard gets one of its own."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
    return shards


def _values(name: str, shape: Shape, seed: int, writable: torch.Tensor) -> torch.Tensor:
    """Random float32 values that keep the variance of what passes through, so that every part of the model counts."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    values = torch.randn(shape, generator=generator)
    if name.endswith((".class_embedding", ".position_embedding.weight", "tok_embeddings.weight")):
        return values
    if len(shape) == 1:
        return values * 0.1 if name.endswith(".bias") else 1 + values * 0.1
    values *= _gain(name) / math.sqrt(math.prod(shape[1:]))
    if name != "output.weight":
        return values
    # A zero row has the logit 0, below the largest of hundreds of random ones.
    kept = torch.zeros_like(values)
    kept[writable] = values[writable]
    return kept


def _gain(name: str) -> float:
    # Attention scores of deviation 4 pick few positions. At 1 every position sees nearly the same average, and some
    # answers repeat one token to their end.
    return 2.0 if name.endswith(".wqkv.weight") else 1.0


def _write_shards(folder: Path, shards: list[list[str]], format: str, values_of: Callable[[str], torch.Tensor]) -> None:
    stem, ending = FORMATS[format]
    weight_map: dict[str, str] = {}
    total_size = 0
    for file, names in zip(_shard_files(stem, ending, len(shards)), shards, strict=True):
        tensors = {name: values_of(name) for name in names}
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(names, file)
        if format == "pickle":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
            # safetensors creates its files readable by the owner alone.
            (folder / file).chmod(folder.stat().st_mode & 0o666)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.{ending}.index.json", index)


def _shard_files(stem: str, ending: str, num_shards: int) -> Iterator[str]:
    if num_shards == 1:
        yield f"{stem}.{ending}"
        return
    for number in range(1, num_shards + 1):
        yield f"{stem}-{number:05d}-of-{num_shards:05d}.{ending}"


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
