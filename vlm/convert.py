"""Official pickle checkpoints (`pytorch_model*.bin`) -> safetensors, shard by shard.

Weights only: a pickle that asks for more than tensors is refused, by torch's restricted unpickler and nothing looser.
It knows no architecture: every key keeps its name, dtype and value. The target appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file

from planner.errors import SourceError
from planner.units import format_bytes
from vlm.checkpoint import INDEX_NAME, SINGLE_NAME, read_weight_map, refuse_lfs_pointer

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# Data that a loader may need. An allow-list: code and pickles of any name stay behind.
_COPIED_SUFFIXES = frozenset({".json", ".model", ".txt", ".md", ".jinja", ".tiktoken"})
_COPIED_NAMES = frozenset({"LICENSE", "NOTICE"})

_ZIP_START = b"PK\x03\x04"
_NUM_NAMES_SHOWN = 5
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

# What torch.load raises for bytes that are no checkpoint, found by loading damaged files: nearly anything.
_DAMAGED = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError, struct.error)

_STORABLE_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedShard:
    """One written shard; `index` counts from 1, as in the files' names.

    `tied` are the keys that shared one tensor, each of which now has a copy of its own.
    """

    index: int
    num_shards: int
    source: str
    target: str
    keys: tuple[str, ...]
    num_bytes: int
    tied: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert_checkpoint` wrote: the shards in order, and the other files it copied."""

    folder: Path
    shards: tuple[ConvertedShard, ...]
    copied: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)


def convert_checkpoint(
    source: str | Path, target: str | Path, on_shard: Callable[[ConvertedShard], object] | None = None
) -> Conversion:
    """Safetensors copy of a pickle checkpoint, with its configuration and tokenizer but none of its code.

    At most one shard is in memory. `on_shard` is called after each; an exception from it stops the conversion.
    Raises: SourceError when the source is not such a checkpoint, is damaged or hostile, or the target
            exists or has no room.
    """
    source, target = Path(source), Path(target)
    _refuse_target(target)
    keys_of_shard = _keys_of_shard(source)
    copied = _names_to_copy(source)
    needed = [source / name for name in (*keys_of_shard, *copied)]
    _refuse_unreadable(needed)
    _refuse_full_disk(sum(path.stat().st_size for path in needed), target)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        shards = _convert_shards(source, partial, keys_of_shard, on_shard)
        _write_index(partial, shards)
        for name in copied:
            shutil.copyfile(source / name, partial / name)
        partial.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        raise SourceError(
            f"writing {target} failed: {error}. Nothing was left behind; free space or choose another target"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Conversion(folder=target, shards=shards, copied=copied)


def open_pickles(source: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a pickle checkpoint by name, still on disk where the files are of torch 1.6 or newer.

    Raises: SourceError when the source is not such a checkpoint, or is damaged or hostile.
    """
    keys_of_shard = _keys_of_shard(source)
    _refuse_unreadable(source / name for name in keys_of_shard)
    return {
        key: tensor
        for name, keys in keys_of_shard.items()
        for key, tensor in _load_tensors(source / name, keys).items()
    }


def _refuse_target(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise SourceError(f"the target {target} exists: nothing is overwritten. Choose another name or remove it")
    if not target.parent.is_dir():
        raise SourceError(f"the target's folder {target.parent} does not exist. Create it, or choose another target")


def _refuse_full_disk(num_bytes: int, target: Path) -> None:
    free_bytes = shutil.disk_usage(target.parent).free
    if num_bytes > free_bytes:
        raise SourceError(
            f"the target {target} needs {format_bytes(num_bytes)}, but {target.parent} has {format_bytes(free_bytes)} "
            f"free: {format_bytes(num_bytes - free_bytes)} short. Free that much, or choose a target on another disk"
        )


def _keys_of_shard(source: Path) -> dict[str, frozenset[str] | None]:
    """Pickle files by name, each with the keys that the index gives it; None where there is no index."""
    if not source.is_dir():
        raise SourceError(f"{source} is not a folder: give the folder that holds config.json and {PICKLE_FILE}")
    present = [name for name in (INDEX_NAME, SINGLE_NAME) if (source / name).exists()]
    if present:
        raise SourceError(f"{source} already is a safetensors checkpoint ({present[0]}): there is nothing to convert")
    if (source / PICKLE_INDEX).is_file():
        return _indexed_keys(source)
    if (source / PICKLE_FILE).is_file():
        return {PICKLE_FILE: None}
    raise SourceError(
        f"{source} has no pickle checkpoint: neither {PICKLE_INDEX} nor {PICKLE_FILE} is there. "
        "Only these names are converted; give the folder they are in"
    )


def _indexed_keys(source: Path) -> dict[str, frozenset[str] | None]:
    weight_map = read_weight_map(source / PICKLE_INDEX)
    names = sorted(set(weight_map.values()))
    if not names:
        raise SourceError(f"{source / PICKLE_INDEX} names no weights: it must give each its shard. Download it again")
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise SourceError(
            f"{source} lacks {len(missing)} of {len(names)} shards that {PICKLE_INDEX} names: {', '.join(missing)}. "
            "Download them into that folder"
        )
    return {name: frozenset(key for key, shard in weight_map.items() if shard == name) for name in names}


def _names_to_copy(source: Path) -> tuple[str, ...]:
    return tuple(
        path.name
        for path in sorted(source.iterdir())
        if (path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES)
        and not path.name.endswith(".index.json")
        and path.is_file()
    )


def _refuse_unreadable(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            refuse_lfs_pointer(path)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}. Check that it is yours to read") from error


def _convert_shards(
    source: Path,
    folder: Path,
    keys_of_shard: Mapping[str, frozenset[str] | None],
    on_shard: Callable[[ConvertedShard], object] | None,
) -> tuple[ConvertedShard, ...]:
    shards: list[ConvertedShard] = []
    for index, (name, keys) in enumerate(keys_of_shard.items(), start=1):
        target = _target_name(index, len(keys_of_shard))
        tensors = _load_tensors(source / name, keys)
        # Grouped before they are taken apart, after which nothing is shared any more.
        tied = _tied_keys(tensors)
        _separate(tensors)
        save_file(tensors, folder / target, metadata={"format": "pt"})
        # safetensors creates its files readable by the owner alone; the folder's own mode follows the umask.
        (folder / target).chmod(folder.stat().st_mode & 0o666)
        shards.append(
            ConvertedShard(
                index=index,
                num_shards=len(keys_of_shard),
                source=name,
                target=target,
                keys=tuple(tensors),
                num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
                tied=tied,
            )
        )
        del tensors
        if on_shard is not None:
            on_shard(shards[-1])
    return tuple(shards)


def _target_name(index: int, num_shards: int) -> str:
    return SINGLE_NAME if num_shards == 1 else f"model-{index:05d}-of-{num_shards:05d}.safetensors"


def _load_tensors(path: Path, keys: frozenset[str] | None) -> dict[str, torch.Tensor]:
    content = _unpickle(path)
    if not isinstance(content, dict) or not content:
        kind = "an empty dict" if isinstance(content, dict) else type(content).__name__
        raise SourceError(f"{path} holds {kind}, not a dict of tensor names to tensors: it is no checkpoint shard")
    unstorable = [f"{key} ({fault})" for key, value in content.items() if (fault := _fault(key, value))]
    if unstorable:
        raise SourceError(
            f"{path} has {len(unstorable)} entries that safetensors cannot hold: {_shown(unstorable)}. "
            "Every entry must be a plain tensor under a text name; save such a state dict first"
        )
    if keys is not None and keys != content.keys():
        absent, extra = sorted(keys - content.keys()), sorted(content.keys() - keys)
        raise SourceError(
            f"{path} does not hold the tensors that {PICKLE_INDEX} gives it: {len(absent)} absent ({_shown(absent)}), "
            f"{len(extra)} not in the index ({_shown(extra)}). Take index and shards from the same download"
        )
    _refuse_inflation(path, content)
    return {key: value.detach().resolve_conj().resolve_neg() for key, value in content.items()}


def _unpickle(path: Path) -> object:
    """Content of a torch pickle, tensors still on disk where its format allows that."""
    # Files of before torch 1.6 are no zip archives and cannot be mapped into memory; the unpickler is as strict.
    with path.open("rb") as stream:
        is_zip = stream.read(len(_ZIP_START)) == _ZIP_START
    try:
        with warnings.catch_warnings():
            # About pickle protocols, which a user can do nothing about.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        found = _REFUSED_GLOBAL.search(str(error))
        what = f"asks for {found.group(1)}, which is no part of a weight file" if found else "is no plain weight file"
        raise SourceError(
            f"{path} {what}: it was refused and nothing in it was executed. Weights are tensors only; "
            "get the checkpoint as safetensors, or from a source you trust"
        ) from error
    except _DAMAGED as error:
        first_line = str(error).split("\n")[0][:200]
        raise SourceError(
            f"{path} ({format_bytes(path.stat().st_size)}) cannot be read as a torch checkpoint: "
            f"{type(error).__name__} {first_line}. It may be cut off or be another file; download it again"
        ) from error


def _fault(key: object, value: object) -> str | None:
    if not isinstance(key, str) or key == "__metadata__":
        return "not a tensor name"
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    if value.is_sparse or value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        return f"a {value.layout} {value.dtype} tensor on {value.device.type}"
    return None if value.dtype in _STORABLE_DTYPES else f"of dtype {value.dtype}"


def _refuse_inflation(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Stops a small file from filling the disk: a stride of zero makes any size out of one stored element.

    Twice the file lets every tensor be tied once; the constant lets a small file hold a small expanded buffer.
    """
    file_bytes, tensor_bytes = path.stat().st_size, sum(tensor.nbytes for tensor in tensors.values())
    if tensor_bytes > 2 * file_bytes + 16 * 2**20:
        raise SourceError(
            f"{path} is {format_bytes(file_bytes)}, but its tensors would take {format_bytes(tensor_bytes)}: more than "
            "twice the file, so they repeat elements. Save the state dict with .contiguous() tensors first"
        )


def _tied_keys(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys that are one tensor: the same memory, read the same way."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for key, tensor in tensors.items():
        if tensor.numel():
            identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            groups.setdefault(identity, []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


def _separate(tensors: dict[str, torch.Tensor]) -> None:
    """Contiguous tensors in memory of their own, as safetensors asks; all keys stay, so any loader finds its own."""
    storages: set[int] = set()
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages or not tensor.is_contiguous():
            tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)


def _write_index(folder: Path, shards: tuple[ConvertedShard, ...]) -> None:
    total_size = sum(shard.num_bytes for shard in shards)
    weight_map = {key: shard.target for shard in shards for key in shard.keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_NAMES_SHOWN} more" if len(names) > _NUM_NAMES_SHOWN else ""
    return (", ".join(names[:_NUM_NAMES_SHOWN]) or "none") + more
