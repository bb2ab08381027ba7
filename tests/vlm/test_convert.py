"""Conversion of pickle checkpoints: bit-exact for honest ones, a clear refusal and nothing left for all others."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from planner.errors import SourceError
from vlm.checkpoint import read_checkpoint
from vlm.convert import ConvertedShard, convert_checkpoint
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class Marker:
    """Unpickled without restrictions, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def save_single(folder: Path, tensors: object, *, is_zip: bool = True) -> None:
    torch.save(tensors, folder / SINGLE, _use_new_zipfile_serialization=is_zip)


def save_sharded(folder: Path, *shards: dict[str, torch.Tensor]) -> None:
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.resolve_conj().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bits(tensor[None])
    )


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def assert_refused(source: Path, target: Path, message: str) -> None:
    before = sorted(target.parent.iterdir())
    with pytest.raises(SourceError, match=message):
        convert_checkpoint(source, target)
    assert sorted(target.parent.iterdir()) == before


def test_an_official_pickle_checkpoint_becomes_its_safetensors_twin(tmp_path: Path) -> None:
    options = {"num_layers": 2, "max_shard_bytes": 2**17, "seed": 5}
    twin = write_random_checkpoint(tmp_path / "twin", **options)
    source = write_random_checkpoint(tmp_path / "source", format="pickle", **options)
    conversion = convert_checkpoint(source, tmp_path / "target")
    assert {path.name for path in conversion.folder.iterdir()} == {path.name for path in twin.iterdir()}
    assert_same(loaded(conversion.folder), loaded(twin))
    indexes = [
        json.loads((folder / "model.safetensors.index.json").read_text()) for folder in (twin, conversion.folder)
    ]
    assert indexes[0] == indexes[1]
    assert len(read_checkpoint(conversion.folder).tensors) == len(indexes[0]["weight_map"])


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_single_pickle_becomes_a_single_file_with_an_index(is_zip: bool, source: Path, target: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5)}
    save_single(source, tensors, is_zip=is_zip)
    conversion = convert_checkpoint(str(source), str(target))
    assert_same(loaded(target), tensors)
    assert (target / "model.safetensors").is_file()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 88}
    assert index["weight_map"] == {"a.weight": "model.safetensors", "b": "model.safetensors"}
    assert conversion.num_bytes == 88


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_every_dtype_shape_and_layout_stays_bit_exact(is_zip: bool, source: Path, target: Path) -> None:
    base = torch.randn(4, 6)
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): base.to(dtype) for dtype in (*floats, *integers)}
    tensors |= {
        "transposed": base.t(),
        "every second": base[:, ::2],
        "middle": base[1:3],
        "expanded": base[:1].expand(5, 6),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "also empty": torch.zeros(0, 3),
        "not a number": torch.tensor([float("nan"), -0.0, float("inf")]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(base[0].clone()),
    }
    save_single(source, tensors, is_zip=is_zip)
    conversion = convert_checkpoint(source, target)
    assert_same(loaded(target), {name: tensor.detach() for name, tensor in tensors.items()})
    assert conversion.shards[0].tied == ()


def test_tied_tensors_are_all_kept_and_reported(source: Path, target: Path) -> None:
    shared = torch.randn(8, 4)
    tensors = {"embed": shared, "head": shared, "other": torch.randn(2), "rows": shared[:2]}
    save_single(source, tensors)
    conversion = convert_checkpoint(source, target)
    assert_same(loaded(target), tensors)
    assert conversion.shards[0].tied == (("embed", "head"),)
    assert conversion.num_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_shards_are_written_one_by_one_and_reported(source: Path, target: Path) -> None:
    save_sharded(source, {"a": torch.ones(2)}, {"b": torch.ones(3), "c": torch.ones(1)})
    written: list[tuple[ConvertedShard, int]] = []

    def report(shard: ConvertedShard) -> None:
        written.append((shard, len(list(target.parent.glob(".target*/*.safetensors")))))
        assert not target.exists()

    conversion = convert_checkpoint(source, target, report)
    assert [(shard.index, shard.num_shards, shard.keys, shard.num_bytes, number) for shard, number in written] == [
        (1, 2, ("a",), 8, 1),
        (2, 2, ("b", "c"), 16, 2),
    ]
    assert [shard.source for shard in conversion.shards] == [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    assert [shard.target for shard in conversion.shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


def test_shards_carry_the_format_mark_and_the_folders_mode(source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(2)})
    convert_checkpoint(source, target)
    with safe_open(target / "model.safetensors", framework="pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    assert (target / "model.safetensors").stat().st_mode & 0o666 == target.stat().st_mode & 0o666


def test_data_files_are_copied_but_no_code_and_no_pickles(source: Path, target: Path) -> None:
    save_sharded(source, {"a": torch.ones(2)}, {"b": torch.ones(3)})
    kept = {"config.json": b'{"x": 1}', "tokenizer.model": b"\x00\x01", "vocab.txt": b"a\n", "LICENSE": b"free"}
    left = {"modeling_x.py": b"boom", "optimizer.pt": b"boom", "training_args.bin": b"boom", "run.sh": b"boom"}
    for name, content in (kept | left).items():
        (source / name).write_bytes(content)
    (source / "folder.json").mkdir()
    conversion = convert_checkpoint(source, target)
    assert conversion.copied == tuple(sorted(kept))
    assert {path.name: path.read_bytes() for path in target.iterdir() if path.name in kept} == kept
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in target.iterdir()} == shards | kept.keys()


def test_shards_may_be_links_into_a_blob_store(tmp_path: Path, source: Path, target: Path) -> None:
    (tmp_path / "blobs").mkdir()
    save_single(source, {"a": torch.ones(2)})
    (source / SINGLE).rename(tmp_path / "blobs" / "0123")
    (source / SINGLE).symlink_to(Path("..") / "blobs" / "0123")
    convert_checkpoint(source, target)
    assert_same(loaded(target), {"a": torch.ones(2)})


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    is_zip: bool, tmp_path: Path, source: Path, target: Path
) -> None:
    marker = tmp_path / "marker"
    save_single(source, {"a": torch.ones(2), "b": Marker(marker)}, is_zip=is_zip)
    message = r"pytorch_model.bin asks for posix.mkdir, which is no part of a weight file: it was refused and nothing"
    assert_refused(source, target, message)
    assert not marker.exists()
    # The file does what it threatens when it is let: the test could fail.
    torch.load(source / SINGLE, weights_only=False)
    assert marker.exists()


def test_a_bare_hostile_pickle_is_refused_and_not_run(tmp_path: Path, source: Path, target: Path) -> None:
    (source / SINGLE).write_bytes(pickle.dumps(Marker(tmp_path / "marker")))
    assert_refused(source, target, "it was refused and nothing in it was executed")
    assert not (tmp_path / "marker").exists()


def test_a_hostile_second_shard_leaves_nothing_of_the_first(tmp_path: Path, source: Path, target: Path) -> None:
    save_sharded(source, {"a": torch.ones(2)}, {"b": torch.ones(2)})
    torch.save({"b": Marker(tmp_path / "marker")}, source / "pytorch_model-00002-of-00002.bin")
    assert_refused(source, target, "pytorch_model-00002-of-00002.bin asks for posix.mkdir")
    assert not (tmp_path / "marker").exists()


def test_a_pickled_module_is_refused(source: Path, target: Path) -> None:
    save_single(source, torch.nn.Linear(2, 2))
    assert_refused(source, target, r"asks for torch.nn.modules.linear.Linear, which is no part of a weight file")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_cut_off_is_refused(is_zip: bool, source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(300)}, is_zip=is_zip)
    content = (source / SINGLE).read_bytes()
    for length in (1, 3, 4, 100, len(content) // 2, len(content) - 1):
        (source / SINGLE).write_bytes(content[:length])
        assert_refused(source, target, "(cannot be read as a torch checkpoint|is no plain weight file)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"pytorch_model.bin \(0 B\) cannot be read as a torch checkpoint: EOFError"),
        (b"junk" * 9, r"\(36 B\) cannot be read as a torch checkpoint: .* It may be cut off or be another file"),
        (b"PK\x03\x04" + bytes(99), r"\(103 B\) cannot be read as a torch checkpoint: RuntimeError"),
    ],
    ids=["empty", "junk", "no archive"],
)
def test_a_file_that_is_no_pickle_is_refused(content: bytes, message: str, source: Path, target: Path) -> None:
    (source / SINGLE).write_bytes(content)
    assert_refused(source, target, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list, not a dict of tensor names to tensors: it is no checkpoint shard"),
        ({}, "holds an empty dict, not a dict of tensor names"),
        (
            {"state_dict": {"a": torch.ones(2)}, "step": 3},
            r"has 2 entries .*state_dict \(of type dict\), step \(of typ",
        ),
        ({0: torch.ones(2)}, r"0 \(not a tensor name\)"),
        ({"__metadata__": torch.ones(2)}, r"__metadata__ \(not a tensor name\)"),
        ({"a": torch.eye(2).to_sparse()}, r"a \(a torch.sparse_coo torch.float32 tensor on cpu\)"),
        ({"a": torch.ones(2, device="meta")}, r"a \(a torch.strided torch.float32 tensor on meta\)"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, r"a \(of dtype torch.complex128\). Every entry must be a plain"),
    ],
    ids=["list", "nothing", "wrapped", "number", "reserved", "sparse", "meta", "dtype"],
)
def test_content_that_safetensors_cannot_hold_is_refused(
    content: object, message: str, source: Path, target: Path
) -> None:
    save_single(source, content)
    assert_refused(source, target, message)


def test_a_small_file_cannot_fill_the_disk(source: Path, target: Path) -> None:
    save_single(source, {"a": torch.zeros(1).expand(2**40)})
    assert_refused(source, target, r"but its tensors would take 4096.00 GiB: more than twice the file, so they repeat")


@pytest.mark.parametrize(
    "name", ["../outside.bin", "/etc/passwd", "a/../../b.bin", "a\\b.bin", "C:b.bin", "a\x00.bin", ""], ids=repr
)
def test_an_index_that_points_outside_its_folder_is_refused(name: str, source: Path, target: Path) -> None:
    torch.save({"a": torch.ones(2)}, source.parent / "outside.bin")
    write_index(source, {"a": name})
    assert_refused(source, target, "pytorch_model.bin.index.json points outside its folder: ")


def test_missing_shards_are_all_named(source: Path, target: Path) -> None:
    save_sharded(source, *({f"w{number}": torch.ones(1)} for number in range(4)))
    for number in (2, 4):
        (source / f"pytorch_model-0000{number}-of-00004.bin").unlink()
    missing = "pytorch_model-00002-of-00004.bin, pytorch_model-00004-of-00004.bin"
    assert_refused(source, target, f"lacks 2 of 4 shards that {INDEX} names: {missing}. Download them")


def test_a_shard_with_other_keys_than_the_index_gives_it_is_refused(source: Path, target: Path) -> None:
    save_sharded(source, {"a": torch.ones(1), "b": torch.ones(1)})
    torch.save({"a": torch.ones(1), "c": torch.ones(1)}, source / "pytorch_model-00001-of-00001.bin")
    message = r"does not hold the tensors that .* gives it: 1 absent \(b\), 1 not in the index \(c\). Take index and"
    assert_refused(source, target, message)


def test_a_long_list_of_keys_is_cut_short(source: Path, target: Path) -> None:
    save_single(source, {f"w{number}": torch.ones(1) for number in range(9)})
    write_index(source, {"a": SINGLE})
    assert_refused(source, target, r"9 not in the index \(w0, w1, w2, w3, w4 and 4 more\)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "index.json is not valid JSON"),
        ("[]", "index.json holds list, not a JSON object"),
        ("{}", "index.json has no weight_map"),
        ('{"weight_map": {"a": 1}}', "index.json has no weight_map"),
        ('{"weight_map": {}}', "index.json names no weights: it must give each its shard"),
        ("[" * 100_000, "index.json is not valid JSON"),
    ],
    ids=["empty", "list", "no map", "number", "empty map", "deep"],
)
def test_a_broken_index_is_refused(content: str, message: str, source: Path, target: Path) -> None:
    (source / INDEX).write_text(content)
    assert_refused(source, target, message)


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.model", "config.json"])
def test_a_git_lfs_pointer_is_refused(name: str, source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(2)})
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert_refused(source, target, f"{name} is a git-LFS pointer.*git lfs pull")


def test_a_safetensors_checkpoint_needs_no_conversion(tmp_path: Path, target: Path) -> None:
    source = write_random_checkpoint(tmp_path / "source", family="internlm2", num_layers=1, max_shard_bytes=2**30)
    assert_refused(source, target, r"source already is a safetensors checkpoint \(model.safetensors\)")


def test_a_folder_without_pickles_is_refused(source: Path, target: Path) -> None:
    (source / "consolidated.00.pth").write_bytes(b"x")
    assert_refused(source, target, f"source has no pickle checkpoint: neither {INDEX} nor {SINGLE} is there")


def test_a_file_instead_of_a_folder_is_refused(source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(2)})
    assert_refused(source / SINGLE, target, f"{SINGLE} is not a folder: give the folder that holds config.json")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_target_is_not_touched(kind: str, source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(2)})
    {"folder": target.mkdir, "file": target.touch, "dangling link": lambda: target.symlink_to("gone")}[kind]()
    assert_refused(source, target, "target exists: nothing is overwritten. Choose another name or remove it")


def test_a_target_without_a_parent_is_refused(source: Path, tmp_path: Path) -> None:
    save_single(source, {"a": torch.ones(2)})
    with pytest.raises(SourceError, match="the target's folder .*nowhere does not exist. Create it"):
        convert_checkpoint(source, tmp_path / "nowhere" / "target")


def test_a_stopped_conversion_leaves_nothing(source: Path, target: Path) -> None:
    save_sharded(source, {"a": torch.ones(2)}, {"b": torch.ones(2)})
    # a shell starts what it runs in the background with Ctrl-C ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, target, lambda shard: signal.raise_signal(signal.SIGINT))
    assert list(target.parent.iterdir()) == [source]


def test_a_source_that_cannot_fit_is_refused_before_it_is_read(source: Path, target: Path) -> None:
    with (source / SINGLE).open("wb") as stream:
        stream.truncate(shutil.disk_usage(source).free + 2**33)
    assert_refused(source, target, r"the target .* needs .* GiB free: \d+\.\d\d GiB short. Free that much")


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond `num_bytes`, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full_at", ["shard", "copy"])
def test_a_disk_that_fills_up_is_reported_and_nothing_left(full_at: str, source: Path, target: Path) -> None:
    save_single(source, {"a": torch.ones(300_000 if full_at == "shard" else 2)})
    (source / "tokenizer.model").write_bytes(bytes(1_000_000))
    with largest_file(900_000):
        assert_refused(
            source, target, "writing .*target failed: .*File too large.* Nothing was left behind; free space"
        )
