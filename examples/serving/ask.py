"""Starts vLLM's OpenAI server of a base model with a ReFT adapter, and asks both the same questions.

The adapter is the model `reft` of the server, the base is the model `base`. The server runs until the answers are
there, and its output goes to a log file. With --url, a server that already runs is asked instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from openai import APIConnectionError, OpenAI


PROMPTS = ["What is the capital of Japan?", "What do bees make?", "Why should I read books?"]


def main() -> None:
    args = parse_args()
    with served(args) as client:
        asked = [(prompt, model) for prompt in args.prompts for model in ("base", "reft")]
        with ThreadPoolExecutor() as pool:  # all at once: the server answers base and adapter in one batch
            answers = pool.map(lambda one: answer(client, *one, args.max_new_tokens), asked)
            for (prompt, model), text in zip(asked, answers):
                print(f"{model}: {prompt}\n    {text}", flush=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("outputs/SmolLM2-135M-Instruct"), help="base model's folder")
    parser.add_argument("--adapter", type=Path, default=Path("outputs/quickstart"), help="adapter's folder")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens (default: 48)")
    parser.add_argument("--port", type=int, default=8000, help="the server's port (default: 8000)")
    parser.add_argument("--url", help="a running server, for example http://localhost:8000/v1; none is started")
    parser.add_argument("--log", type=Path, default=Path("outputs/serving.log"), help="the server's output")
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="your own prompts instead of the built-in ones")
    return parser.parse_args()


@contextmanager
def served(args: argparse.Namespace) -> Iterator[OpenAI]:
    """A client of the server, which is started and stopped unless one is given by its URL."""
    client = OpenAI(base_url=args.url or f"http://127.0.0.1:{args.port}/v1", api_key="none")
    if args.url:
        yield client
        return
    # `vllm serve` is the same. It does not start in vLLM's CPU builds, whose distribution has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(args.port), "--model", str(args.base)]
    command += ["--served-model-name", "base", "--max-model-len", "1024", "--dtype", "float32", "--enforce-eager"]
    # vLLM would take most of the memory for its cache, on a CPU too.
    command += ["--kv-cache-memory-bytes", str(2**30)]
    command += ["--enable-lora", "--lora-modules", f"reft={args.adapter}"]
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_up(client):
                if server.poll() is not None:
                    raise SystemExit(
                        f"The server did not start. The end of {args.log}:\n{args.log.read_text()[-2000:]}"
                    )
                time.sleep(1)
            yield client
        finally:
            server.terminate()
            server.wait()


def is_up(client: OpenAI) -> bool:
    try:
        client.models.list()
    except APIConnectionError:
        return False
    return True


def answer(client: OpenAI, prompt: str, model: str, max_new_tokens: int) -> str:
    """The greedy answer of a model of the server, on one line."""
    message = {"role": "user", "content": prompt}
    done = client.chat.completions.create(
        model=model, messages=[message], max_tokens=max_new_tokens, temperature=0
    ).choices[0]
    return " ".join((done.message.content or "").split()) + ("" if done.finish_reason == "stop" else " ...")


if __name__ == "__main__":
    main()
