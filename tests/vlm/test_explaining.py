"""What people ask about the models they know, with the answers that others have published or that can be counted."""

from __future__ import annotations

from typing import Any

import pytest

from planner.errors import UnsupportedModelError
from planner.explanation import Explanation
from planner.machine import Machine
from planner.units import GIB
from planner.workload import Workload
from vlm.catalogue import catalogue_names, lookup
from vlm.explaining import decoder_facts, explain, image_tokens
from vlm.model import find_model


def explained(name: str, gpus: str = "", **work: Any) -> Explanation:
    devices = Machine.parse(gpus).devices if gpus else ()
    return explain(find_model(name), Workload(**work), devices)


def kv_bytes_by_config(name: str) -> int:
    """Key and value of every layer in 16 bits, by the config alone; as many as attention heads where it names none."""
    facts = decoder_facts(lookup(name).config)
    assert facts is not None
    return 2 * facts.num_layers * (facts.num_kv_heads or facts.num_heads) * facts.head_dim * 2


NAMES = sorted(set(catalogue_names().values()))


def has_costs(name: str) -> bool:
    try:
        return bool(explained(name))
    except UnsupportedModelError:
        return False


WITH_COSTS = [name for name in NAMES if has_costs(name)]


# -- questions with known answers


@pytest.mark.parametrize(
    ("name", "gib"),
    [("internlm2-20b", 36.99), ("internlm2-7b", 14.41), ("internlm-xcomposer2-vl-7b", 16.14), ("glm-4v-9b", 25.90)],
)
def test_16_bit_weights(name: str, gib: float) -> None:
    found = {row.name: row.weight_bytes for row in explained(name).precisions if not row.quantised}
    assert round(found["float16"] / GIB, 2) == gib
    assert found["float32"] == 2 * found["float16"]


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("internlm2-7b", 131_072),
        ("internlm2-20b", 196_608),
        ("internlm2-1_8b", 98_304),
        ("glm-4v-9b", 40_960),
        ("internlm-7b", 524_288),
        ("internlm-20b", 1_228_800),
        ("qwen-7b-chat", 524_288),
        ("qwen-vl-chat", 524_288),
        ("internlm-xcomposer-vl-7b", 524_288),
        ("internlm-xcomposer2d5-7b", 131_072),
    ],
)
def test_kv_cache_per_position(name: str, kv_bytes: int) -> None:
    assert kv_bytes_by_config(name) == kv_bytes
    if name in WITH_COSTS:
        assert explained(name).kv_bytes_per_position == kv_bytes


def test_what_grouped_queries_save_internlm2_20b() -> None:
    found = explained("internlm2-20b")
    assert found.layer is not None
    assert (found.layer.num_heads, found.layer.num_kv_heads) == (48, 8)
    assert found.layer.full_kv_bytes_per_position == 6 * 196_608


def test_the_parts_of_an_xcomposer2_layer_are_those_of_its_weights_shapes() -> None:
    found = explained("internlm-xcomposer2-vl-7b").layer
    assert found is not None and found.feed_forward is not None
    assert found.attention_parameters == 25_165_824 + 16_777_216
    assert found.feed_forward.num_parameters == 3 * 58_720_256
    assert found.other_parameters == 18_874_368 + 8_192


@pytest.mark.parametrize(
    ("name", "width"), [("glm-4v-9b", 13696), ("internlm-7b", 11008), ("internlm-20b", 13824), ("internlm2-7b", 14336)]
)
def test_the_feed_forward_is_gated_and_nearly_all_of_the_layer_is_known(name: str, width: int) -> None:
    found = explained(name).layer
    assert found is not None and found.feed_forward is not None
    assert found.feed_forward.num_parameters == 3 * found.hidden_size * width
    assert found.other_parameters < 0.001 * found.num_parameters


def test_qwens_feed_forward_is_half_as_wide_as_its_config_says() -> None:
    facts = decoder_facts(lookup("qwen-7b-chat").config)
    assert facts is not None and facts.ffn_width == 11008


def test_a_mixtures_experts_are_nearly_all_of_it() -> None:
    found = explained("qwen3-vl-235b-a22b-instruct").layer
    assert found is not None and found.feed_forward is not None
    assert (found.feed_forward.num_experts, found.feed_forward.num_active_experts) == (128, 8)
    assert found.feed_forward.num_parameters == 128 * 3 * 4096 * 1536


def test_a_config_that_leaves_sizes_to_its_class_is_not_guessed_at() -> None:
    assert decoder_facts(lookup("llava-1.5-7b-hf").config) is None
    assert explained("llava-1.5-7b-hf").layer is None


@pytest.mark.parametrize("name", WITH_COSTS)
def test_a_config_says_the_same_of_the_cache_as_the_graph(name: str) -> None:
    """Where they differ, or the layers are not as many, nothing would be told apart.

    A cache of windows alone does not grow, and so says nothing of its heads.
    """
    found, facts = explained(name), decoder_facts(lookup(name).config)
    assert (found.layer is None) == (facts is None or not found.kv_bytes_per_position)
    assert sum(part.num_parameters for part in found.parts) == lookup(name).parameters


# -- pictures


def test_a_picture_of_the_models_own_size() -> None:
    (native,) = explained("internlm-xcomposer2-vl-7b").pictures
    assert (native.size_px, native.num_tokens) == (None, 1225)
    assert explained("internlm2-7b").pictures == ()


def test_any_size_is_counted_in_cells() -> None:
    native, example = explained("qwen3-vl-8b-instruct").pictures
    assert native.size_px is None and example.size_px == (1024, 768)
    assert example.num_tokens == (1024 // 32) * (768 // 32)


@pytest.mark.parametrize(
    ("name", "native"), [("internvl3-8b-hf", ((448, 448), 256)), ("mistral-small-3.1-24b-instruct-2503", (None, 3025))]
)
def test_what_the_processor_decides_is_not_guessed_at(name: str, native: tuple[tuple[int, int] | None, int]) -> None:
    own, example = explained(name).pictures
    assert (own.size_px, own.num_tokens) == native
    assert (example.size_px, example.num_tokens) == ((1024, 768), None)
    assert explained(name).fixed_image_px is None


@pytest.mark.parametrize(
    ("size_px", "num_tokens"),
    [((560, 560), 841), ((1024, 768), 2061), ((1280, 720), 2861), ((1920, 1080), 5281), ((3840, 2160), 10101)],
)
def test_tiles_of_xcomposer2d5(size_px: tuple[int, int], num_tokens: int) -> None:
    assert image_tokens(find_model("internlm-xcomposer2d5-7b"), size_px) == num_tokens


# -- speed


def test_decode_of_glm_4v_is_near_what_its_makers_measured_and_bound_by_launches() -> None:
    """33.4 tokens/s on an A100 or H100 (zai-org/GLM-4, basic_demo/README_en.md): int4 has little to gain there."""
    (bounds,) = explained("glm-4v-9b", "a100-80g").bounds
    assert bounds.decode.bound == "launches" and bounds.prefill.bound == "compute"
    assert 1 / bounds.decode.total_s == pytest.approx(33.4, rel=0.1)
    assert bounds.int4_decode is not None
    assert bounds.int4_decode.unpacked_s > bounds.decode.total_s
    assert bounds.decode.launch_s > 0.8 * bounds.int4_decode.fused_s


def test_glm_4v_in_int4_with_its_vision_encoder_leaves_room_in_the_10_gb_that_were_measured() -> None:
    smallest = explained("glm-4v-9b").precisions[-1]
    assert smallest.name == "int4" and "vision encoder" in smallest.quantised
    assert 0.8 * 10e9 < smallest.weight_bytes < 10e9


def test_a_slower_memory_binds_where_a_faster_one_left_launches() -> None:
    by_gpu = {one.device: one.decode.bound for one in explained("glm-4-9b-chat", "a100-80g,t4,2xt4").bounds}
    assert by_gpu == {"a100-80g": "launches", "t4": "bandwidth"}


def test_a_batch_computes_more_per_byte() -> None:
    alone, batched = (explained("internlm2-7b", "rtx4090", batch_size=size).bounds[0] for size in (1, 32))
    assert batched.decode.flops_per_byte > 10 * alone.decode.flops_per_byte
