"""A process that holds models and runs them on command. There is one for each environment.

It reads one JSON command a line from standard input, and answers each with a line. It runs on the environment's
interpreter and imports only methods.py from beside it, so that the environment of another library needs nothing
installed.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parent))
from methods import METHODS, Setting, Subject, base_model, training_batch


class Bench:
    """The models of one process, by name. The public methods are the commands."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.subjects: dict[str, Subject] = {}
        self.settings: dict[str, Setting] = {}
        self.batches: dict[str, dict[str, torch.Tensor]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def versions(self) -> dict[str, Any]:
        """Versions of Python and the libraries, and the GPU's name."""
        from importlib.metadata import PackageNotFoundError, version

        found: dict[str, Any] = {"python": sys.version.split()[0]}
        for name in ("torch", "transformers", "peft", "peft-reft", "pyreft", "adapters"):
            with contextlib.suppress(PackageNotFoundError):
                found[name] = version(name)
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
        return found

    def build(self, name: str, method: str, setting: dict[str, Any]) -> dict[str, Any]:
        """Make a model with a method on it, and keep it under a name."""
        self.settings[name] = Setting(**setting)
        subject = self.subjects[name] = METHODS[method](self.settings[name])
        self.batches[name] = training_batch(self.settings[name])
        subject.model.train()
        if subject.parameters():
            # The default of transformers' Trainer.
            self.optimizers[name] = torch.optim.AdamW(subject.parameters(), lr=1e-4, fused=True)
        return {"trainable": subject.trainable()}

    def drop(self, name: str) -> dict[str, Any]:
        """Forget a model."""
        for held in (self.subjects, self.settings, self.batches, self.optimizers):
            held.pop(name, None)
        gc.collect()
        return {}

    def step(self, name: str) -> dict[str, Any]:
        """One training step: forward, backward, and the optimizer where something is trained."""
        started = self._now(name)
        self._step(name)
        return {"seconds": self._now(name) - started}

    def _step(self, name: str) -> None:
        self.subjects[name].call(self.subjects[name].model, self.batches[name]).backward()
        if name in self.optimizers:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()

    def peak(self, name: str) -> dict[str, Any]:
        """The most memory in bytes that a step allocates at once, beyond what was allocated before it."""
        self._step(name)
        gc.collect()
        if self.settings[name].device != "cpu":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self._step(name)
            return {"bytes": torch.cuda.max_memory_allocated() - before}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self._step(name)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return {"bytes": most}

    def generate(self, name: str, tokens: int, rows: int) -> dict[str, Any]:
        """Generate `tokens` tokens for `rows` prompts. With one token, this is the prefill."""
        model, setting = self.subjects[name].model, self.settings[name]
        if model.training:  # a switch of the mode makes ReFT look at all weights anew, and a server does it once
            model.eval()
        ids = self.batches[name]["input_ids"].view(-1, setting.length)[:rows, : setting.prompt]
        started = self._now(name)
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                use_cache=True,
            )
        return {"seconds": self._now(name) - started}

    def load_and_switch(self, name: str) -> dict[str, Any]:
        """Save an adapter, load it on a base twice, and switch between the two."""
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            self.subjects[name].model.save_pretrained(folder)
            size = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
            base = base_model(self.settings[name])
            started = time.perf_counter()
            model = PeftModel.from_pretrained(base, folder)
            loading = time.perf_counter() - started
            model.load_adapter(folder, "other")
        ids = self.batches[name]["input_ids"][:1, :16]
        model.eval()
        switching = []
        with torch.no_grad():
            for turn in range(20):
                started = time.perf_counter()
                model.set_adapter("other" if turn % 2 == 0 else "default")
                switching.append(time.perf_counter() - started)
                model(input_ids=ids)
        return {"bytes": size, "load_seconds": loading, "switch_seconds": sorted(switching)[len(switching) // 2]}

    def _now(self, name: str) -> float:
        """The time in seconds, when the device has done its work. On a CPU with one thread it is the processor's time,
        which other programs on the machine change less."""
        if self.settings[name].device != "cpu":
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:
            return time.process_time()
        return time.perf_counter()


def main() -> None:
    # Standard output is for answers only: what libraries print there goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench(int(sys.argv[1]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(bench, command.pop("do"))(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
