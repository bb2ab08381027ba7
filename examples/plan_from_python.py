"""Plan a real-size model for two unequal GPUs, change the workload, and use the map in transformers. Needs no torch."""

from planner import InfeasibleError, Machine, Workload
from vlm.model import find_model
from vlm.planning import plan_for

model = find_model("internlm-xcomposer2-vl-7b")
machine = Machine.parse("24GiB,12GiB")

plan = plan_for(model, machine, Workload(num_images=2, new_tokens=1024))
print(f"{plan.model.name}: {plan.kv_tokens:,} KV positions fit")
for stage in plan.stages:
    print(f"  GPU {stage.device}: {stage.modules[0]} ... {stage.modules[-1]}")
print("from_pretrained(device_map=...) takes", dict(list(plan.device_map.items())[:3]), "...")

try:
    plan_for(model, Machine.parse("12GiB"))
except InfeasibleError as problem:
    print(problem)
