"""Real models in shape-only mode: tiny ones leave the trace of real values, full-size ones run in no memory."""

import gc
import resource

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from runtime.virtual import DeviceMismatchError, ShapeOnlyError, virtual_gpus
from runtime.virtual.process import PROCESS
from runtime.virtual.shapes import is_shape_only

GIB = 2**30
MIB = 2**20
IMAGE, OPENER = 100, 99
WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CLIP = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def prompt(num_image_tokens=0):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    ids[:, 3 : 3 + num_image_tokens] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def llama():
    return LlamaForCausalLM, LlamaConfig(**TEXT), prompt()


def mixture_of_experts():
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**TEXT, **sizes), prompt()


def llava():
    config = LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=CLIP, image_token_index=IMAGE)
    return LlavaForConditionalGeneration, config, prompt(4) | {"pixel_values": torch.rand(2, 3, 28, 28)}


def qwen():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 2, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": WIDTH}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_parameters": rope},
        vision_config=vision | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        vision_start_token_id=OPENER,
    )
    inputs = prompt(6)
    inputs["input_ids"][:, 2] = OPENER
    grid = torch.tensor([[1, 4, 6]] * 2)
    marks = {"mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}
    return (
        Qwen2_5_VLForConditionalGeneration,
        config,
        inputs | marks | {"pixel_values": torch.rand(48, 1176), "image_grid_thw": grid},
    )


def mllama():
    vision = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0]}
    config = MllamaConfig(
        text_config=TEXT | {"cross_attention_layers": [1]},
        vision_config=vision | {"vision_output_dim": 2 * WIDTH, "supported_aspect_ratios": [[1, 1], [1, 2]]},
        image_token_index=IMAGE,
    )
    images = {"pixel_values": torch.rand(2, 1, 4, 3, 28, 28), "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long)}
    images["aspect_ratio_mask"] = torch.tensor([[[1, 0, 0, 0]]] * 2)
    images["cross_attention_mask"] = torch.ones(2, 12, 1, 4, dtype=torch.long)
    return MllamaForConditionalGeneration, config, prompt(1) | images


MODELS = {builder.__name__: builder for builder in (llama, mixture_of_experts, llava, qwen, mllama)}


def halves(model):
    """The second half of the decoder layers, the norm and the head on the second device, all else on the first."""
    language = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is language)
    second = {f"{path}.layers.{index}" for index in range(1, len(language.layers))} | {f"{path}.norm", "lm_head"}
    parts = {name: int(name in second) for name in _parts(model, path)}
    return {name: index for name, index in parts.items() if name}


def _parts(model, path):
    """Every child on the way down to the language model, its children, and its layers."""
    parents = [""] + [path[: len(prefix)] for prefix in _prefixes(path)] + [f"{path}.layers"]
    for parent in parents:
        for name, _ in model.get_submodule(parent).named_children():
            child = f"{parent}.{name}" if parent else name
            if child not in parents:
                yield child


def _prefixes(path):
    names = path.split(".")
    return [".".join(names[: index + 1]) for index in range(len(names))]


class Recorder:
    """Writes down what every computing operation returns, with the bytes alive then on both devices."""

    def __init__(self, ledger):
        self.ledger = ledger
        self.seen = []

    def mismatched(self, problem, tensors):
        raise problem

    def ran(self, op, args, outcome):
        self.note(op.name(), outcome)

    def copied(self, source, copy):
        self.note("copied", copy)

    def note(self, name, outcome):
        alive = [self.ledger.allocated_bytes(index) for index in range(2)]
        self.seen.append((name, looks(outcome), alive))


def looks(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, str(value.device)
    return [looks(item) for item in value] if isinstance(value, list | tuple) else type(value)


def placed(model_class, config, shape_only, attention, device_map=None):
    """The model with random weights, or with none, split by accelerate."""
    torch.manual_seed(0)
    with torch.device("meta" if shape_only else "cpu"):
        model = model_class._from_config(config, attn_implementation=attention).eval()
    for name, index in (device_map or halves(model)).items():
        model.get_submodule(name).to(f"vgpu:{index}")
    return dispatch_model(model, device_map or halves(model))


@torch.no_grad()
def trace(builder, shape_only, attention):
    """What prefill and two decode steps return, operation by operation, and the bytes per device."""
    gpus = virtual_gpus([GIB] * 2, shape_only=shape_only)
    model_class, config, inputs = builder()
    model = placed(model_class, config, shape_only, attention)
    recorder = PROCESS.observer = Recorder(gpus.ledger)
    try:
        cache = DynamicCache(config=config.get_text_config())
        outputs = model(**send_to_device(inputs, "vgpu:0"), past_key_values=cache)
        for _ in range(2):
            token = torch.full((2, 1), 7, device="vgpu:0")
            outputs = model(input_ids=token, past_key_values=outputs.past_key_values)
    finally:
        PROCESS.observer = None
    alive = [(gpus.ledger.allocated_bytes(index), gpus.ledger.peak_bytes(index)) for index in range(2)]
    return recorder.seen, alive, {decision.op for decision in gpus.decisions}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("builder", MODELS.values(), ids=MODELS)
def test_split_model_leaves_the_trace_of_real_values(builder, attention):
    expected, expected_bytes, nothing = trace(builder, False, attention)
    gc.collect()
    seen, seen_bytes, decided = trace(builder, True, attention)
    assert len(seen) > 100
    assert seen == expected
    assert seen_bytes == expected_bytes
    assert nothing == set()
    assert decided <= {"topk", "_to_copy"}, "experts, and integer buffers of a meta module"


def has_no_bytes(tensor):
    return is_shape_only(tensor, PROCESS.shape_only)


@pytest.fixture
def gpus():
    return virtual_gpus([GIB] * 2, shape_only=True)


def test_router_decides_at_a_line_of_the_model(gpus):
    model_class, config, inputs = mixture_of_experts()
    model = placed(model_class, config, True, "sdpa")
    with torch.no_grad():
        logits = model(**send_to_device(inputs, "vgpu:0")).logits
    assert has_no_bytes(logits)
    [(decision, count)] = [item for item in gpus.decisions.items() if item[0].op == "topk"]
    assert count == config.num_hidden_layers
    assert decision.place.startswith("transformers/models/qwen3_moe/modeling_qwen3_moe.py:")
    assert decision.shape == (24, 2)


def test_misplaced_norm_is_refused_as_with_real_values(gpus):
    model_class, config, inputs = llama()
    with torch.device("meta"):
        model = model_class(config).eval()
    for name, index in {"model": 0, "lm_head": 0, "model.norm": 1}.items():
        model.get_submodule(name).to(f"vgpu:{index}")
    with pytest.raises(DeviceMismatchError, match="two devices, vgpu:1 and vgpu:0!$"), torch.no_grad():
        model(**send_to_device(inputs, "vgpu:0"))


WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_model_generates_tokens_that_rules_decide(options, gpus):
    model_class, config, inputs = llava()
    model = placed(model_class, config, True, "sdpa")
    settings = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=2, **options)
    tokens = model.generate(**send_to_device(inputs, "vgpu:0"), generation_config=settings)
    assert tokens[:, -4:].tolist() == [[0] * 4] * 2
    assert {decision.op for decision in gpus.decisions} & {"argmax", "multinomial"}


def test_inference_mode_and_gradients_change_nothing(gpus):
    model_class, config, inputs = llama()
    model = placed(model_class, config, True, "sdpa")
    ids = inputs["input_ids"].to("vgpu:0")
    with torch.inference_mode():
        inferred = looks(model(ids).logits)
    logits = model(ids).logits
    assert looks(logits) == inferred
    assert logits.requires_grad


def test_everything_is_freed_with_the_model(gpus):
    model_class, config, inputs = llava()
    model = placed(model_class, config, True, "sdpa")
    with torch.no_grad():
        outputs = model(**send_to_device(inputs, "vgpu:0"))
    del model, outputs
    gc.collect()
    assert [gpus.ledger.allocated_bytes(index) for index in range(2)] == [0, 0]


# LLaVA-1.5-7B: https://huggingface.co/llava-hf/llava-1.5-7b-hf/blob/main/config.json
FULL_TEXT = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
FULL_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
FULL_MAP = {
    "model.vision_tower": 0,
    "model.multi_modal_projector": 0,
    "model.language_model.embed_tokens": 0,
    "model.language_model.rotary_emb": 0,
    **{f"model.language_model.layers.{index}": int(index > 14) for index in range(32)},
    "model.language_model.norm": 1,
    "lm_head": 1,
}
NUM_PARAMETERS = 7_063_427_072


def full_llava():
    config = LlavaConfig(text_config=FULL_TEXT, vision_config=FULL_VISION)
    config.dtype = torch.bfloat16
    ids = torch.full((1, 640), config.image_token_index)
    ids[:, :32] = ids[:, -32:] = 5
    pixels = torch.rand(1, 3, 336, 336, dtype=torch.bfloat16)
    return LlavaForConditionalGeneration, config, {"input_ids": ids, "pixel_values": pixels}


@torch.no_grad()
def test_full_size_model_runs_in_no_memory():
    gpus = virtual_gpus([8 * GIB] * 2, shape_only=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model_class, config, inputs = full_llava()
    model = placed(model_class, config, True, "sdpa", FULL_MAP)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS
    weights_bytes = sum(gpus.ledger.allocated_bytes(index) for index in range(2))
    outputs = model(**send_to_device(inputs, "vgpu:0"))
    assert outputs.logits.shape == (1, 640, 32064)
    for _ in range(2):
        token = torch.full((1, 1), 7, device="vgpu:0")
        outputs = model(input_ids=token, past_key_values=outputs.past_key_values)
    kv_bytes = 2 * 32 * 642 * 4096 * 2
    alive = sum(gpus.ledger.allocated_bytes(index) for index in range(2))
    assert 2 * NUM_PARAMETERS <= weights_bytes <= 2 * NUM_PARAMETERS + MIB
    assert 0 <= alive - weights_bytes - kv_bytes <= MIB
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 500 * MIB


@torch.no_grad()
def test_full_size_model_is_refused_by_a_device_too_small_for_its_activations():
    virtual_gpus([7 * GIB, 7 * GIB], shape_only=True)
    model_class, config, inputs = full_llava()
    model = placed(model_class, config, True, "sdpa", FULL_MAP)
    many = {"input_ids": torch.full((1, 16000), 5)}
    with pytest.raises(torch.OutOfMemoryError, match=r"vgpu:\d has a total capacity of 7\.00 GiB"):
        model(**send_to_device(many, "vgpu:0"))


@torch.no_grad()
def test_all_logits_on_the_host_are_refused_with_the_caller():
    virtual_gpus([16 * GIB], shape_only=True)
    model_class, config, inputs = full_llava()
    model = placed(model_class, config, True, "sdpa", dict.fromkeys(FULL_MAP, 0))
    logits = model(**send_to_device(inputs, "vgpu:0")).logits
    message = (
        r"test_virtual_shape_only_models.py:\d+ in test_all_logits\S+: \[1, 640, 32064\] numbers are read on the host"
    )
    with pytest.raises(ShapeOnlyError, match=message):
        logits.cpu()
    assert logits[:, -1].cpu().shape == (1, 32064)
