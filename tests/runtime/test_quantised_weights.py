"""Weights in fewer bits, loaded for real: planned bytes are held bytes, and answers are transformers' own.

bitsandbytes and compressed-tensors run on the CPU, and on virtual GPUs by their kernels in plain torch.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig, LlamaConfig

from planner import Machine, PlanMismatchError, SourceError, UnsupportedModelError, Workload
from planner.cli.main import main
from runtime import inspect_placement, load_sharded, place_inputs, shard
from runtime.costs import trace_costs
from runtime.quantised import held_tensors
from runtime.quiet import quiet_libraries
from runtime.virtual.process import PROCESS
from vlm.cost_library import CostLibrary
from vlm.internlm_xcomposer2.processing import XComposer2Processor
from vlm.internlm_xcomposer2.random_checkpoint import write_random_checkpoint
from vlm.model import find_model
from vlm.planning import plan_for
from vlm.tiny import tiny_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'plan-devices[quantized]'")

SHORT = Workload(prompt_tokens=32, new_tokens=8, dtype="bfloat16")
WHOLE = Machine.parse("8GiB")
LAYOUTS = ("int8", "nf4", "nf4-double", "fp4")
ARCHITECTURES = ("llava", "qwen2_5_vl", "gemma3", "mllama", "qwen3_vl_moe")
IDS = torch.arange(5, 16)[None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Libraries say on every product that inputs are cast; and virtual GPUs are free again after each test."""
    with quiet_libraries():
        yield
    gc.collect()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints of transformers' architectures, each written once."""
    written: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in written:
            written[model_type] = tmp_path_factory.mktemp(model_type)
            tiny_model(model_type, dtype=torch.bfloat16)[0].save_pretrained(written[model_type])
        return written[model_type]

    return folder


def transformers_config(layout: str, skip_modules: list[str] | None) -> BitsAndBytesConfig:
    if layout == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layout[:3],
        bnb_4bit_use_double_quant=layout.endswith("double"),
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip_modules,
    )


def bytes_by_tensor(model: nn.Module) -> dict[str, int]:
    """Bytes of every parameter with its scales and code books, and of every buffer."""
    found = {name: sum(map(nbytes, held_tensors(value))) for name, value in model.named_parameters()}
    return found | {name: buffer.nbytes for name, buffer in model.named_buffers()}


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes


def planned_bytes(model: Any) -> int:
    return sum(part.weights_bytes for part in model.plan.memory.values())


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(place_inputs(model, inputs) if hasattr(model, "plan") else inputs)).logits.cpu()


# -- quantised while loading


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_planned_bytes_are_loaded_bytes_module_by_module_as_transformers_would_load_them(
    architecture: str, layout: str, folder_of: Callable[[str], Path]
) -> None:
    """With the vision path, what is quantised is exactly what transformers quantises when it is told nothing."""
    folder = folder_of(architecture)
    workload = replace(SHORT, quantize=layout, quantize_vision=True)  # type: ignore[arg-type]
    model = load_sharded(folder, machine=WHOLE, workload=workload, devices="cpu")
    reference = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=transformers_config(layout, None), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert bytes_by_tensor(model) == bytes_by_tensor(reference)
    assert sum(bytes_by_tensor(model).values()) == planned_bytes(model)
    assert torch.equal(logits(model, input_ids=IDS), logits(reference, input_ids=IDS))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_decoder_alone_is_quantised_as_the_plans_names_tell_transformers(
    layout: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("llava")
    model = load_sharded(folder, machine=WHOLE, workload=replace(SHORT, quantize=layout), devices="cpu")  # type: ignore[arg-type]
    part = model.plan.quantization
    assert part.kept == ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    config = transformers_config(layout, part.skip_modules)
    reference = AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert bytes_by_tensor(model) == bytes_by_tensor(reference)
    assert sum(bytes_by_tensor(model).values()) == planned_bytes(model)
    assert torch.equal(logits(model, input_ids=IDS), logits(reference, input_ids=IDS))


@pytest.mark.parametrize("layout", ["int8", "nf4-double"])
def test_a_quantised_model_runs_split_over_virtual_gpus_with_the_planned_bytes_on_each(
    layout: str, folder_of: Callable[[str], Path]
) -> None:
    workload = replace(SHORT, quantize=layout)  # type: ignore[arg-type]
    folder = folder_of("llava")
    whole = load_sharded(folder, machine=WHOLE, workload=workload, devices="cpu")
    split = load_sharded(folder, machine=Machine.parse("2x2GiB"), workload=workload, devices="virtual", verify=True)
    assert len(set(split.hf_device_map.values())) == 2
    held = dict.fromkeys(split.plan.memory, 0)
    for name, value in [*split.named_parameters(), *split.named_buffers()]:
        held[value.device.index] += sum(map(nbytes, held_tensors(value)))
        assert {tensor.device for tensor in held_tensors(value)} == {value.device}, name
    assert held == {key: part.weights_bytes for key, part in split.plan.memory.items()}
    assert sum(entry.num_bytes for entry in inspect_placement(split)) == sum(held.values())
    found, expected = logits(split, input_ids=IDS), logits(whole, input_ids=IDS)
    # On the CPU four bits are multiplied by a kernel of its own.
    assert torch.equal(found, expected) if layout == "int8" else close(found, expected)


class Fullest(TorchDispatchMode):
    """The most that a virtual GPU held after any operation: a kernel's own scratch, which others lack, is not seen."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.num_bytes = max(self.num_bytes, torch.vgpu.memory_allocated(0))  # type: ignore[attr-defined]
        return result


@pytest.mark.parametrize("layout", ["int8", "nf4", "nf4-double"])
def test_while_a_model_is_loaded_a_device_holds_what_was_planned_and_no_more(layout: str, tmp_path: Path) -> None:
    """Behind the last large weight come the small ones of its layer's attention, which the plan counts as there."""
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4, "vocab_size": 64}
    text = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **sizes), dtype=torch.bfloat16)
    text.save_pretrained(tmp_path)
    workload = replace(SHORT, quantize=layout, num_images=0)  # type: ignore[arg-type]
    model = find_model(str(tmp_path), CostLibrary(None, trace_costs).find)
    plan = plan_for(model, WHOLE, workload)
    with Fullest() as fullest:
        loaded = load_sharded(model, plan, devices="virtual")
    packing_bytes = max(group.loading_bytes for group in model.graph(plan.workload))
    planned_bytes = plan.memory[0].weights_bytes + packing_bytes
    rounding_bytes = 512 * 3 * len(list(loaded.parameters()))
    assert planned_bytes - packing_bytes // 4 < fullest.num_bytes <= planned_bytes + rounding_bytes


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 0.05 * expected.abs().max())


def test_virtual_gpus_are_free_again_although_libraries_keep_code_books_on_them(
    folder_of: Callable[[str], Path],
) -> None:
    workload = replace(SHORT, quantize="nf4-double", dtype="float32")
    for _ in range(2):
        model = load_sharded(folder_of("llava"), machine=Machine.parse("2x2GiB"), workload=workload, devices="virtual")
        logits(model, input_ids=IDS)
        del model
    assert "quantisers" in PROCESS.caches


@pytest.fixture(scope="module")
def xcomposer2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("xcomposer2") / "tiny", dtype="float32")


@pytest.mark.parametrize("layout", ["int8", "nf4"])
def test_partial_lora_layers_quantise_their_base_and_add_their_low_rank_part_as_it_is(
    layout: str, xcomposer2: Path
) -> None:
    workload = Workload(dtype="float32", prompt_tokens=64, new_tokens=4)
    plain = load_sharded(xcomposer2, machine=WHOLE, workload=workload, devices="cpu")
    quantised = replace(workload, quantize=layout)  # type: ignore[arg-type]
    model = load_sharded(xcomposer2, machine=WHOLE, workload=quantised, devices="cpu")
    layer, original = (one.model.layers[0].attention.wqkv for one in (model, plain))
    assert isinstance(layer, type(original)) and type(layer.weight) is not nn.Parameter
    assert torch.equal(layer.Plora_A.weight, original.Plora_A.weight)
    buffers = sum(buffer.nbytes for buffer in model.buffers())  # a part of its own where a graph is written down
    assert sum(bytes_by_tensor(model).values()) == planned_bytes(model) + buffers
    hidden, image_index = torch.randn(1, 8, layer.in_features), torch.tensor([2, 3])
    with torch.no_grad():
        low_rank = layer(hidden, image_index) - layer(hidden)
        expected = original(hidden, image_index) - original(hidden)
    assert torch.allclose(low_rank, expected, atol=1e-5)
    assert not low_rank[0, 4:].any() and low_rank[0, 2:4].any()


def test_a_model_with_partial_lora_answers_from_a_picture_split_and_whole_alike(xcomposer2: Path) -> None:
    inputs = XComposer2Processor.from_folder(xcomposer2)("What is this?", Image.new("RGB", (60, 40), "red"))
    workload = Workload(dtype="float32", prompt_tokens=64, new_tokens=4, quantize="int8")
    models = [
        load_sharded(xcomposer2, machine=Machine.parse(spec), workload=workload, devices=devices)
        for spec, devices in (("8GiB", "cpu"), ("2x2GiB", "virtual"))
    ]
    answers = [
        model.generate(**place_inputs(model, inputs), max_new_tokens=4, do_sample=False).tolist() for model in models
    ]
    assert answers[0] == answers[1]


# -- stored so


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_saved_quantised_is_planned_and_loaded_to_the_byte(
    layout: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    saved = AutoModelForImageTextToText.from_pretrained(
        folder_of("llava"),
        quantization_config=transformers_config(layout, None),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    saved.save_pretrained(tmp_path)  # before its first forward, which packs weights for CPUs
    model = load_sharded(tmp_path, machine=WHOLE, workload=replace(SHORT, dtype="auto"), devices="cpu")
    assert model.plan.workload.dtype == "bfloat16"
    assert model.plan.quantization.stored and model.plan.quantization.layouts == (layout,)
    assert bytes_by_tensor(model) == bytes_by_tensor(saved)
    assert sum(bytes_by_tensor(model).values()) == planned_bytes(model)
    assert torch.equal(logits(model, input_ids=IDS), logits(saved, input_ids=IDS))


COMPRESSED: dict[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel"},
}


def write_compressed(folder: Path, name: str) -> Path:
    """A tiny Llama as compressed-tensors writes it."""
    compressed_tensors = pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    quantization = compressed_tensors.quantization
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 300}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**COMPRESSED[name]), format=name
    )
    content = quantization.QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=name)
    quantization.apply_quantization_config(model, content)
    largest = 448 if COMPRESSED[name]["type"] == "float" else 2 ** (COMPRESSED[name]["num_bits"] - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight, scale = module.weight.data, module.weight_scale.data
            scale.copy_(weight.view(weight.shape[0], scale.shape[1], -1).abs().amax(-1) / largest)
    compressor = compressed_tensors.compressors.ModelCompressor(quantization_config=content)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_are_unpacked_in_place_and_planned_so(name: str, tmp_path: Path) -> None:
    folder = write_compressed(tmp_path, name)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": "cpu"})
    stored_bytes = sum(bytes_by_tensor(reference).values())
    expected = logits(reference, input_ids=IDS)  # transformers unpacks in the first forward
    workload = replace(SHORT, num_images=0)
    model = load_sharded(folder, machine=WHOLE, workload=workload, devices="cpu")
    assert bytes_by_tensor(model) == bytes_by_tensor(reference)
    assert sum(bytes_by_tensor(model).values()) == planned_bytes(model) > stored_bytes
    assert torch.equal(logits(model, input_ids=IDS), expected)
    del model, reference
    split = load_sharded(folder, machine=Machine.parse("2x2GiB"), workload=workload, devices="virtual", verify=True)
    assert torch.equal(logits(split, input_ids=IDS), expected)
    assert {value.device.index for value in split.parameters()} == {0, 1}


# -- refusals


def test_a_method_whose_library_is_not_there_is_planned_and_not_loaded(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = folder_of("llava")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "language_model" in name and name.endswith("q_proj.weight"))
    rows, cols = tensors.pop(name).shape
    module = name.removesuffix(".weight")
    tensors[f"{module}.qweight"] = torch.zeros(cols // 8, rows, dtype=torch.int32)
    tensors[f"{module}.scales"] = torch.zeros(cols // 64, rows, dtype=torch.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**content, "quantization_config": gptq}))
    with pytest.raises(UnsupportedModelError, match=r"gptq-int4 cannot be loaded here: .* never run here"):
        load_sharded(tmp_path, machine=WHOLE, workload=SHORT, devices="cpu")


def test_a_plan_for_other_layers_or_for_plain_weights_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llava")
    plan = load_sharded(folder, machine=WHOLE, workload=replace(SHORT, quantize="int8"), devices="cpu").plan
    wrong = replace(plan, quantization=replace(plan.quantization, kept=("lm_head",)))
    with pytest.raises(PlanMismatchError, match="the plan quantises 14 layers, and here 28 are outside"):
        load_sharded(folder, wrong, devices="cpu")
    stored = replace(plan, quantization=replace(plan.quantization, stored=True))
    with pytest.raises(PlanMismatchError, match="the plan is for quantised weights, and the checkpoint's are plain"):
        load_sharded(folder, stored, devices="cpu")


def test_a_model_in_memory_is_not_quantised_by_placing_it(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llava")
    plan = load_sharded(folder, machine=WHOLE, workload=replace(SHORT, quantize="nf4"), devices="cpu").plan
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    with pytest.raises(PlanMismatchError, match="the plan is for weights in nf4, and this model's are plain"):
        shard(plain, plan, devices="cpu")


def test_weights_that_are_missing_leave_nothing_on_the_devices(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = folder_of("llava")
    plan = load_sharded(folder, machine=WHOLE, workload=replace(SHORT, quantize="nf4-double"), devices="cpu").plan
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(content))
    three = replace(SHORT, quantize="nf4-double")
    with pytest.raises(SourceError, match="has no value for"):
        load_sharded(tmp_path, machine=Machine.parse("2x2GiB"), workload=three, devices="virtual")
    gc.collect()
    for let_go in PROCESS.caches.values():
        let_go()
    assert [PROCESS.ledger.allocated_bytes(index) for index in range(PROCESS.ledger.num_devices)] == [0, 0]
    assert plan.quantization is not None


# -- the command


@pytest.mark.parametrize("given", ["map.json", "auto"])
def test_check_counts_the_memory_of_quantised_weights(
    given: str, folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a map of one's own, and in the one that transformers makes for layers of that size."""
    (tmp_path / "map.json").write_text('{"": 0}')
    name = given if given == "auto" else str(tmp_path / given)
    weights = {}
    for layout in ("none", "nf4"):
        main(
            ["check", str(folder_of("llava")), name, "--gpus", "2GiB", "--json"]
            + ["--dtype", "bfloat16", "--prompt-tokens", "32", "--quantize", layout]
        )
        found = json.loads(capsys.readouterr().out)
        peaks = [found["costs"][one]["loads"][0]["peak"] for one in ("given", "ours")]
        weights[layout] = peaks[0]["weights_bytes"]
        assert peaks[1]["weights_bytes"] == weights[layout]
    plan = load_sharded(folder_of("llava"), machine=WHOLE, workload=replace(SHORT, quantize="nf4"), devices="cpu").plan
    assert weights["none"] - weights["nf4"] == plan.quantization.plain_bytes - plan.quantization.weight_bytes
