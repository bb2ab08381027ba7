"""Why a device map fails, before it does: a residual is cut, and the smallest repair is found and proven."""

from planner import Machine
from runtime import diagnose
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model

model, _ = tiny_model("llava")
device_map = {
    "model.vision_tower": 1,
    "model.multi_modal_projector": 1,
    "model.language_model.embed_tokens": 0,
    "model.language_model.rotary_emb": 0,
    "model.language_model.layers.0.self_attn": 0,
    "model.language_model.layers.0.mlp": 1,
    "model.language_model.layers.0.input_layernorm": 0,
    "model.language_model.layers.0.post_attention_layernorm": 1,
    "model.language_model.layers.1": 1,
    "model.language_model.norm": 1,
    "lm_head": 1,
}
diagnosis = diagnose(model, example_inputs(model), device_map, machine=Machine.parse("2x24GiB"))
for finding in diagnosis.findings:
    print(f"{finding.severity}: {finding.title}\n  {finding.place}\n  fix: {finding.fix}")
if diagnosis.repair and diagnosis.repair.proven:
    print(diagnosis.diff)
