"""Trains a classifier on a task of GLUE with transformers' Trainer, by LoReFT, by LoRA, in full, or its head alone.

Settings come from a YAML file, roberta-base.yaml (the paper's) unless another is given. Options of the command line
override them. As in the paper, the validation set is split: one part (half of it, or 1,000 examples where it has more
than 5,000) chooses the best epoch, and the metric on the other part is the result, in OUTPUT_DIR/results.json.
`peft-reft evaluate TASK --adapter OUTPUT_DIR` scores the adapter on the whole validation set.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_reft import ReftConfig
from peft_reft.evaluation import TASKS, read_examples, score


SETTINGS = {
    "rank": int, "alpha": int, "positions": str, "dropout": float, "learning_rate": float, "epochs": float,
    "batch_size": int, "warmup_ratio": float, "weight_decay": float, "max_length": int,
}  # fmt: skip


def main() -> None:
    args = parse_args()
    task, settings = TASKS[args.task], read_settings(args)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=task.labels, dtype=torch.float32)
    model = prepare_model(model, args.method, settings)

    def encoded(split: str, limit: int | None) -> list[dict[str, Any]]:
        rows = read_examples(task, split, args.data_dir, args.hub, limit, args.seed)
        return [
            tokenizer(*(row[field] for field in task.inputs), truncation=True, max_length=settings["max_length"])
            | {"labels": row["label"]}
            for row in rows
        ]

    choosing, testing = split_in_two(encoded("validation", args.eval_limit), args.seed)

    def metrics(predictions: Any) -> dict[str, float]:
        logits = predictions.predictions
        given = logits[:, 0] if task.labels == 1 else np.argmax(logits, axis=1)
        # An undefined metric (all examples got the same class, for example) counts as 0, that of chance.
        return {name: score(name, given, predictions.label_ids).value or 0.0 for name in task.metrics}

    trainer = Trainer(
        model,
        TrainingArguments(
            args.output_dir,
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            warmup_steps=settings["warmup_ratio"],  # below 1, a share of all steps
            weight_decay=settings["weight_decay"],
            lr_scheduler_type="linear",
            optim="adamw_torch",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model=task.metrics[0],
            label_names=["labels"],
            logging_steps=20,
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=encoded("train", args.limit),
        eval_dataset=choosing,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        processing_class=tokenizer,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    on_choosing, on_testing = trainer.evaluate(choosing), trainer.evaluate(testing)
    results = {
        "task": args.task,
        "model": args.model,
        "method": args.method,
        "settings": settings,
        "seed": args.seed,
        "chosen_by": {name: on_choosing[f"eval_{name}"] for name in task.metrics},
        "test": {name: on_testing[f"eval_{name}"] for name in task.metrics},
        "examples": {"train": len(trainer.train_dataset), "chosen_by": len(choosing), "test": len(testing)},
        **count_parameters(model),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory(),
    }
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--task", required=True, choices=[name for name, task in TASKS.items() if task.family == "glue"]
    )
    parser.add_argument("--model", required=True, help="the encoder's folder or hub name")
    parser.add_argument("--method", default="loreft", choices=["loreft", "lora", "full", "head"])
    parser.add_argument(
        "--data-dir", type=Path, help="folder with the task's files; left out: nyu-mll/glue on the Hub"
    )
    parser.add_argument("--hub", help="another dataset on the Hub")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, help="how many training examples, drawn by the seed")
    parser.add_argument("--eval-limit", type=int, help="how many validation examples, drawn by the seed")
    parser.add_argument("--settings", type=Path, default=Path(__file__).parent / "roberta-base.yaml")
    for name, kind in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="in place of the settings file's")
    return parser.parse_args()


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Each setting from the command line, else from the file's entry for this task, else from that for all tasks."""
    of_method = yaml.safe_load(args.settings.read_text(encoding="utf-8")).get(args.method, {})
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings = {**of_method.get("all", {}), **of_method.get(args.task, {}), **given}
    needed = set(SETTINGS) - {"rank", "alpha", "positions", "dropout"}
    needed |= {"loreft": {"rank", "positions", "dropout"}, "lora": {"rank", "alpha", "dropout"}}.get(
        args.method, set()
    )
    if missing := sorted(needed - set(settings)):
        options = " ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise SystemExit(
            f"{args.settings} has no settings of this kind for {args.method} on {args.task}. Give {options}."
        )
    return settings


def prepare_model(model: Any, method: str, settings: dict[str, Any]) -> Any:
    """The model, prepared for a method. For SEQ_CLS, PEFT trains and saves the classifier along with an adapter."""
    if method == "head":
        model.base_model.requires_grad_(False)
    if method == "loreft":
        config = ReftConfig(
            r=settings["rank"], positions=settings["positions"], dropout=settings["dropout"], task_type="SEQ_CLS"
        )
        return get_peft_model(model, config)
    if method == "lora":
        config = LoraConfig(
            r=settings["rank"],
            lora_alpha=settings["alpha"],
            lora_dropout=settings["dropout"],
            target_modules=["query", "value"],
            task_type="SEQ_CLS",
        )
        return get_peft_model(model, config)
    return model


def split_in_two(examples: list[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Split examples into a part that chooses the best epoch, and a part to test on, which takes no part in that."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    count = 1000 if len(examples) > 5000 else len(examples) // 2
    return shuffled[:count], shuffled[count:]


def count_parameters(model: Any) -> dict[str, Any]:
    """Count trained parameters as the paper does: without the classifier, as a share of the model without it."""
    trained = head = total = 0
    for name, parameter in model.named_parameters():
        is_head = "classifier" in name.split(".") or "score" in name.split(".")
        head += parameter.numel() if is_head and parameter.requires_grad else 0
        trained += parameter.numel() if not is_head and parameter.requires_grad else 0
        total += 0 if is_head or ".reft_" in name or ".lora_" in name else parameter.numel()
    return {"trained_parameters": trained, "trained_share": trained / total, "trained_head_parameters": head}


def peak_memory() -> int:
    """The most memory used, in bytes: of the GPU, or without one, of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
