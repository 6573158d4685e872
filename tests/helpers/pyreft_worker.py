"""Runs checkpoints with the real pyreft. Started by tests/peers/test_convert_peers.py in pyreft's own environment.

    python tests/helpers/pyreft_worker.py jobs.json results.safetensors

jobs.json: a list of {"case": as in cases.json, "folder": a checkpoint, "by": "state" or "load"}. By "state", the
checkpoint's weights are put into a model made like the case, as `load_intervention` does. By "load", pyreft's own
`ReftModel.load` makes the whole model, on a base in bfloat16. A job {"tables": true} writes `tables.json` beside the
results: the module of each of pyvene's components of a layer. A job {"locations": [[positions, share_weights, length],
...]} writes `locations.json`: pyreft's lists of positions for two interventions in a prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "data" / "conversion"))

import make_pyreft
import pyreft
import torch
from safetensors.torch import save_file


def loaded_by_pyreft(case, folder):
    reft = pyreft.ReftModel.load(folder, make_pyreft.base_of(case["base"]).to(torch.bfloat16))
    reft.eval()
    ids, mask, places = make_pyreft.batch_of(case)
    with torch.no_grad():
        _, output = reft({"input_ids": ids, "attention_mask": mask}, unit_locations={"sources->base": (None, places)})
    return {"logits": make_pyreft.at_last_tokens(output.logits).contiguous()}


def tables() -> dict[str, dict[str, str]]:
    """Class of a model -> component -> the module whose whole output the component is."""
    from pyvene.models.intervenable_modelcard import type_to_module_mapping

    return {
        kind.__name__: {
            component: entry[0]
            for component, entry in table.items()
            if entry[1] == "register_forward_hook" and len(entry) == 2
        }
        for kind, table in type_to_module_mapping.items()
    }


def main() -> None:
    jobs, target = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = {}
    for index, job in enumerate(jobs):
        if job.get("tables"):
            (target.parent / "tables.json").write_text(json.dumps(tables()))
            continue
        if "locations" in job:
            lists = [
                pyreft.get_intervention_locations(
                    last_position=length, positions=positions, num_interventions=2, share_weights=tied
                )
                for positions, tied, length in job["locations"]
            ]
            (target.parent / "locations.json").write_text(json.dumps(lists))
            continue
        case, folder = job["case"], job["folder"]
        if job["by"] == "load":
            values = loaded_by_pyreft(case, folder)
        else:
            values = make_pyreft.run(make_pyreft.load(case, folder), case)
        results |= {f"{index}.{key}": value.contiguous() for key, value in values.items()}
    save_file(results, target)


if __name__ == "__main__":
    main()
