"""Real transformers models, split by accelerate's own hooks, give on virtual GPUs what they give on the CPU."""

import copy
import gc

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from runtime.virtual import DeviceMismatchError, virtual_gpus

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE_TOKEN = 100
MIB = 2**20

LLAMA_ON_2 = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.layers.2": 1,
    "model.norm": 1,
    "lm_head": 1,
}
LLAMA_ON_3 = LLAMA_ON_2 | {"model.layers.2": 2, "model.norm": 2, "lm_head": 2}
LLAVA_ON_2 = {
    "model.vision_tower": 0,
    "model.multi_modal_projector": 0,
    "model.language_model.embed_tokens": 0,
    "model.language_model.rotary_emb": 0,
    "model.language_model.layers.0": 0,
    "model.language_model.layers.1": 1,
    "model.language_model.layers.2": 1,
    "model.language_model.norm": 1,
    "lm_head": 1,
}
LLAVA_ON_3 = {
    "model.vision_tower": 1,
    "model.multi_modal_projector": 2,
    "model.language_model": 0,
    "lm_head": 2,
}


def llama(dtype=torch.float32, attention="sdpa", **config):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**TEXT | config), attn_implementation=attention)
    return model.to(dtype).eval()


def llava():
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def prompt():
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_prompt():
    inputs = prompt()
    inputs["input_ids"][:, 2:6] = IMAGE_TOKEN
    generator = torch.Generator().manual_seed(3)
    return inputs | {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}


def split(model, device_map):
    return dispatch_model(copy.deepcopy(model), device_map)


def generate(model, inputs, **options):
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0, eos_token_id=2, **options)
    return model.generate(**inputs, generation_config=config)


@pytest.fixture(autouse=True)
def gpus():
    return virtual_gpus([16 * MIB] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("device_map", [LLAMA_ON_2, LLAMA_ON_3], ids=["2 devices", "3 devices"])
@torch.no_grad()
def test_split_llama_has_the_logits_of_the_whole(device_map, attention, dtype):
    model, inputs = llama(dtype, attention), prompt()
    got = split(model, device_map)(**send_to_device(inputs, "vgpu:0")).logits
    assert got.device == torch.device("vgpu:0")
    assert torch.equal(got.cpu(), model(**inputs).logits)


NAMINGS = {
    "integers": lambda index: index,
    "strings": "vgpu:{}".format,
    "devices": lambda index: torch.device("vgpu", index),
}


@pytest.mark.parametrize("name_of", NAMINGS.values(), ids=NAMINGS)
@torch.no_grad()
def test_device_map_may_hold(name_of):
    model, inputs = llama(), prompt()
    parts = split(model, {name: name_of(index) for name, index in LLAMA_ON_3.items()})
    assert {str(parameter.device) for parameter in parts.parameters()} == {"vgpu:0", "vgpu:1", "vgpu:2"}
    assert torch.equal(parts(**send_to_device(inputs, "vgpu:0")).logits.cpu(), model(**inputs).logits)


@pytest.mark.parametrize("device_map", [LLAVA_ON_2, LLAVA_ON_3], ids=["2 devices", "3 devices"])
@torch.no_grad()
def test_split_llava_sees_the_image_as_the_whole_does(device_map):
    model, inputs = llava(), image_prompt()
    expected = model(**inputs).logits
    assert not torch.equal(expected, model(**inputs | {"pixel_values": inputs["pixel_values"] * 2}).logits)
    got = split(model, device_map)(**send_to_device(inputs, "vgpu:0")).logits
    assert torch.equal(got.cpu(), expected)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "no repeats": {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_split_model_generates_the_tokens_of_the_whole(options):
    model, inputs = llava(), image_prompt()
    torch.manual_seed(7)
    expected = generate(model, inputs, **options)
    parts = split(model, LLAVA_ON_3)
    torch.manual_seed(7)
    got = generate(parts, send_to_device(inputs, "vgpu:0"), **options)
    assert got.device == torch.device("vgpu:0")
    assert got.tolist() == expected.tolist()


def test_sampling_depends_on_the_seed_alone():
    parts, inputs = split(llama(), LLAMA_ON_2), send_to_device(prompt(), "vgpu:0")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(parts, inputs, do_sample=True).tolist())
    assert runs[0] == runs[1] != runs[2]


def test_grad_mode_and_inference_mode_change_no_bit():
    model, inputs = llama(), prompt()
    parts, placed = split(model, LLAMA_ON_2), send_to_device(inputs, "vgpu:0")
    assert torch.equal(parts(**placed).logits.detach().cpu(), model(**inputs).logits.detach())
    with torch.inference_mode():
        assert torch.equal(parts(**placed).logits.cpu(), model(**inputs).logits)


def test_model_is_used_later_without_any_context():
    """`load_sharded` hands a model out; nothing may have to be switched on around its use."""

    def made_elsewhere():
        return split(llama(), LLAMA_ON_2)

    parts = made_elsewhere()
    assert generate(parts, send_to_device(prompt(), "vgpu:0"), do_sample=False).shape == (2, 15)


@torch.no_grad()
def test_tied_head_lies_once_where_the_embedding_is(gpus):
    model = llama(tie_word_embeddings=True)
    parts = split(model, LLAMA_ON_2 | {"lm_head": 0})
    assert parts.lm_head.weight is parts.model.embed_tokens.weight
    embedding_bytes = 26 * 512  # 101 x 32 float32 is 12,928 bytes
    layers = sum(-(-p.nbytes // 512) * 512 for p in model.model.layers[0].parameters())
    rotary_bytes = 2 * 512
    assert gpus.ledger.allocated_bytes(0) == embedding_bytes + layers + rotary_bytes
    inputs = prompt()
    assert torch.equal(parts(**send_to_device(inputs, "vgpu:0")).logits.cpu(), model(**inputs).logits)


def test_nothing_is_left_when_the_model_is_gone(gpus):
    parts = split(llava(), LLAVA_ON_3)
    output = generate(parts, send_to_device(image_prompt(), "vgpu:0"), do_sample=False)
    assert all(gpus.ledger.allocated_bytes(index) > 0 for index in range(3))
    del parts, output
    gc.collect()
    assert [gpus.ledger.allocated_bytes(index) for index in range(3)] == [0, 0, 0]


@torch.no_grad()
def test_forward_leaves_only_what_it_returns(gpus):
    parts, inputs = split(llama(), LLAMA_ON_2), send_to_device(prompt(), "vgpu:0")
    before = [gpus.ledger.allocated_bytes(index) for index in range(2)]
    logits = parts(**inputs, use_cache=False).logits
    grown = [gpus.ledger.allocated_bytes(index) - before[index] for index in range(2)]
    assert grown == [-(-logits.nbytes // 512) * 512, 0]


@torch.no_grad()
def test_misplaced_norm_is_refused_at_its_multiplication():
    model = llama()
    for name, index in {"model": 0, "lm_head": 0, "model.norm": 1}.items():
        model.get_submodule(name).to(f"vgpu:{index}")
    with pytest.raises(DeviceMismatchError) as caught:
        model(**send_to_device(prompt(), "vgpu:0"))
    assert str(caught.value) == (
        "Expected all tensors to be on the same device, but found at least two devices, vgpu:1 and vgpu:0!"
    )
    assert (caught.value.op_name, caught.value.devices) == ("mul", ("vgpu:1", "vgpu:0"))
    assert caught.traceback[-1].path.name == "agreement.py"
    assert any(
        entry.name == "forward" and "LlamaRMSNorm" in str(entry.frame.f_locals["self"]) for entry in caught.traceback
    )


@torch.no_grad()
def test_inputs_left_on_the_cpu_are_refused_at_the_embedding():
    model = llama().to("vgpu:1")
    with pytest.raises(DeviceMismatchError, match=r"vgpu:1 and cpu! \(when checking argument for argument index in"):
        model(**prompt())


def test_cache_that_outgrows_its_device_is_refused_there():
    def peak_bytes(capacity_bytes, new_tokens):
        gpus = virtual_gpus([16 * MIB, capacity_bytes])
        parts = split(llama(), LLAMA_ON_2 | {"model.norm": 0, "lm_head": 0})
        ids = torch.ones(1, 2, dtype=torch.long, device="vgpu:0")
        parts.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None)
        return gpus.ledger.peak_bytes(1)

    few, many = peak_bytes(16 * MIB, 8), peak_bytes(16 * MIB, 60)
    between = (few + many) // 2
    assert peak_bytes(between, 8) == few
    with pytest.raises(torch.OutOfMemoryError, match="vgpu:1 has a total capacity"):
        peak_bytes(between, 60)


@torch.no_grad()
def test_offloaded_layer_visits_its_device_and_leaves_it(gpus):
    model, inputs = llama(), prompt()
    on_1 = {name: "vgpu:1" for name in LLAMA_ON_2} | {"model.layers.1": "cpu"}
    parts = split(model, on_1)
    before = gpus.ledger.allocated_bytes(1)
    assert torch.equal(parts(**send_to_device(inputs, "vgpu:1")).logits.cpu(), model(**inputs).logits)
    gc.collect()
    assert gpus.ledger.allocated_bytes(1) == before < gpus.ledger.peak_bytes(1)


def test_from_pretrained_loads_straight_to_the_devices(tmp_path, gpus):
    model, inputs = llama(), prompt()
    model.save_pretrained(tmp_path)
    parts = LlamaForCausalLM.from_pretrained(tmp_path, device_map=LLAMA_ON_3).eval()
    assert all(gpus.ledger.allocated_bytes(index) > 0 for index in range(3))
    with torch.no_grad():
        assert torch.equal(parts(**send_to_device(inputs, "vgpu:0")).logits.cpu(), model(**inputs).logits)
