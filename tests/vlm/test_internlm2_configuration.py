"""Official config.json files in, checked values, official keys out; and the Auto classes after registration."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vlm.internlm_xcomposer2.configuration import InternLM2Config, InternLMXComposer2Config
from vlm.internlm_xcomposer2.modeling import InternLM2ForCausalLM, InternLM2Model, InternLMXComposer2ForCausalLM
from vlm.internlm_xcomposer2.registration import register_auto_classes

KNOWN_BY_IMPORT_ALONE = "internlm2" in CONFIG_MAPPING

OFFICIAL_TEXT = {
    "architectures": ["InternLM2ForCausalLM"],
    "attn_implementation": "eager",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 32768,
    "model_type": "internlm2",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.33.2",
    "use_cache": True,
    "vocab_size": 92544,
}
OFFICIAL_COMPOSER = {
    **OFFICIAL_TEXT,
    "architectures": ["InternLMXComposer2ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm_xcomposer2.InternLMXcomposer2Config"},
    "hidden_size": 4096,
    "img_size": 224,
    "intermediate_size": 14336,
    "max_length": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rope_scaling": {"type": "dynamic", "factor": 1.0},
}
# What transformers keeps elsewhere (attention is a choice of the run), or always writes its own way.
NOT_KEPT = {"attn_implementation", "torch_dtype", "transformers_version"}


@pytest.fixture
def folder_of(tmp_path):
    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("config_class", "official"),
    [(InternLM2Config, OFFICIAL_TEXT), (InternLMXComposer2Config, OFFICIAL_COMPOSER)],
    ids=["text", "vision-language"],
)
def test_official_file_comes_out_as_it_went_in(config_class, official, folder_of):
    folder = folder_of(official)
    config = config_class.from_pretrained(folder)
    config.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert {key: saved.get(key) for key in official.keys() - NOT_KEPT} == {
        key: value for key, value in official.items() if key not in NOT_KEPT
    }
    assert saved["dtype"] == "float32"
    again = config_class.from_pretrained(folder).to_dict()
    assert again == config.to_dict()


def test_both_forms_of_rotary_settings_are_read():
    old = InternLM2Config.from_dict({"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    new = InternLM2Config.from_dict(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}},
    )
    assert old.rope_parameters == new.rope_parameters == {"rope_theta": 5e5, "rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("given", "scaling"),
    [({}, {"type": "dynamic", "factor": 1.0}), ({"rope_scaling": None}, None)],
    ids=["missing", "null"],
)
def test_missing_rope_scaling_is_the_official_one_and_null_is_none(given, scaling):
    written = InternLM2Config.from_dict(given).to_dict()
    assert (written["rope_theta"], written["rope_scaling"]) == (1e6, scaling)
    assert InternLM2Config.from_dict(written).to_dict()["rope_scaling"] == scaling


def test_callers_dictionaries_stay_as_they_are():
    rope, vision = {"type": "dynamic", "factor": 1.0}, {"patch_size": 7}
    InternLMXComposer2Config(rope_scaling=rope, vision_config=vision)
    assert (rope, vision) == ({"type": "dynamic", "factor": 1.0}, {"patch_size": 7})


def test_defaults_are_what_the_official_code_has_no_key_for():
    config = InternLMXComposer2Config()
    assert (config.plora_rank, config.plora_alpha, config.image_token_id) == (256, 256, 92397)
    assert config.vision_config == {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


@pytest.mark.parametrize(("img_size", "image_tokens"), [(490, 1225), (224, 256)])
def test_image_takes_one_position_per_patch(img_size, image_tokens):
    config = InternLMXComposer2Config(img_size=img_size)
    assert config.image_tokens == image_tokens
    assert config.clip_config().image_size == img_size


def test_vision_config_may_name_some_keys_only():
    clip = InternLMXComposer2Config(vision_config={"num_hidden_layers": 3}).clip_config()
    assert (clip.num_hidden_layers, clip.hidden_size, clip.hidden_act) == (3, 1024, "quick_gelu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 36}, "hidden_size / num_attention_heads is 9; rotary positions need it even"),
        ({"img_size": 10}, "img_size 10 is not a multiple of patch_size 4"),
        ({"image_token_id": 40}, "image_token_id 40 is outside of vocab_size 40"),
        ({"image_token_id": -1}, "image_token_id -1 is outside of vocab_size 40"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number of at least 1"),
        ({"vocab_size": "40"}, "vocab_size is '40'; it must be a whole number"),
        ({"plora_rank": True}, "plora_rank is True; it must be a whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling type is 'yarn'; InternLM2 has 'dynamic'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling factor is None; it must be a number"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'; it must be a number"),
        ({"vision_config": {"num_attention_heads": 3}}, "vision_config: hidden_size 1024 is not a multiple of num_at"),
        ({"vision_config": {"patch_size": 0}}, "vision_config: patch_size is 0; it must be a whole number"),
        ({"vision_config": {"patch_size": 4, "image_size": 16}}, "vision_config: image_size 16 is not img_size 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictory_numbers_are_refused_by_key_and_value(xcomposer2_settings, changes, message):
    with pytest.raises(ValueError) as refusal:
        InternLMXComposer2Config(**{**xcomposer2_settings, **changes})
    assert message in str(refusal.value)


def test_all_contradictions_are_told_at_once(xcomposer2_settings):
    with pytest.raises(ValueError, match="hidden_size 30.*patch_size 4.*image_token_id 99"):
        InternLMXComposer2Config(**{**xcomposer2_settings, "hidden_size": 30, "img_size": 9, "image_token_id": 99})


def test_importing_registers_nothing():
    assert not KNOWN_BY_IMPORT_ALONE


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [(InternLM2ForCausalLM, "internlm2_settings"), (InternLMXComposer2ForCausalLM, "xcomposer2_settings")],
    ids=["text", "vision-language"],
)
def test_registered_auto_classes_tell_the_two_families_apart(model_class, settings, request, tmp_path):
    register_auto_classes()
    register_auto_classes()
    model_class(model_class.config_class(**request.getfixturevalue(settings))).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is model_class.config_class
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is model_class
    base_class = InternLM2Model if model_class is InternLM2ForCausalLM else model_class
    assert type(AutoModel.from_pretrained(tmp_path)) is base_class
