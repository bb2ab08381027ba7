"""What a run shows: which modules of a model must share a GPU, and the line of code that says so."""

from runtime import module_graph
from vlm.inputs import example_inputs
from vlm.tiny import tiny_model

model, _ = tiny_model("paligemma")
graph = module_graph(model, example_inputs(model))
for group in graph:
    print(f"{group.role:15} {', '.join(group.modules)}")
    for reason in group.reasons:
        print(f"{'':15}   because of {reason}")
