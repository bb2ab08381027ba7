"""One process per stage of a plan, and questions that keep all of them busy.

plan-devices path/to/checkpoint --batch-size 8 -o plan.yaml
plan-devices launch plan.yaml examples/answer_in_a_pipeline.py plan.yaml path/to/checkpoint
"""

import sys

from runtime import Pipeline
from vlm.prompting import Question

plan, checkpoint, *devices = sys.argv[1:]
questions = [Question(prompt=f"What comes after {number}?") for number in range(12)]

with Pipeline(plan, checkpoint, devices=devices[0] if devices else None) as pipeline:
    for answer in pipeline.generate(questions):  # on the first stage; the others serve it
        print(answer.index, answer.text)
    schedule = pipeline.schedule()

if schedule is not None:
    print(schedule.chart())
