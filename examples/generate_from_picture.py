"""Ask a checkpoint of a family of ours about a picture: generate_from_picture.py FOLDER PICTURE "QUESTION" [2x24GiB].

On real GPUs without the last argument; with it, on virtual ones of that size.
"""

import sys

from planner import Machine
from runtime import load_sharded, place_inputs
from vlm.processors import load_processor

folder, picture, question, *gpus = sys.argv[1:]
processor = load_processor(folder)  # of transformers' own models: AutoProcessor.from_pretrained(folder)
if gpus:
    model = load_sharded(folder, machine=Machine.parse(gpus[0]), devices="virtual", verify=True)
else:
    model = load_sharded(folder, verify=True)

inputs = place_inputs(model, processor(question, picture))
answer = model.generate(**inputs, max_new_tokens=200, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :].tolist()))
