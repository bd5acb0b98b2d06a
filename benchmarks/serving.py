"""How fast vLLM serves a compact model beside the dense one: tokens a second, time to the first token, memory.

Runs where vLLM and lora-svd-vllm are installed, ``.venv-vllm`` of ``make serve-test``. Both models are served at once,
each by a process of its own, and asked in turns, so that both meet the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # before vLLM is imported: each engine in a process of its own

from vllm import LLM, SamplingParams


def main() -> None:
    given = arguments()
    engines, memory = {}, {}
    for name in ("dense", "compact"):
        before = set(psutil.Process().children(recursive=True))
        engines[name] = serve(getattr(given, name), given)
        started = [process for process in psutil.Process().children(recursive=True) if process not in before]
        memory[name] = sum(process.memory_info().rss for process in started)
    found: dict[str, Any] = {"memory": {**memory, "compact / dense": memory["compact"] / memory["dense"]}}
    work: dict[str, Callable[[LLM], float]] = {
        f"tokens a second, batch {batch}": lambda llm, batch=batch: decoded(llm, batch, given.prompt, given.new)
        for batch in given.batches
    }
    work["seconds to the first token"] = lambda llm: first_token(llm, given.prompt)
    for name, measure in work.items():
        found[name] = in_turns(measure, engines, given.rounds)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    print(json.dumps({"settings": settings, **found}, indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--compact", type=Path, required=True, help="folder of the compact one")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="conversations at a time")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens written behind each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model; the median counts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--expand", default="measured", choices=["measured", "always", "never"], help="pivoted factors")
    return parser.parse_args()


def serve(folder: Path, given: argparse.Namespace) -> LLM:
    """A model in a process of its own."""
    return LLM(
        model=str(folder),
        dtype=given.dtype,
        enforce_eager=not given.compile,
        skip_tokenizer_init=True,
        max_model_len=given.prompt + given.new,
        max_num_seqs=max(given.batches),
        kv_cache_memory_bytes=1 << 29,
        enable_prefix_caching=False,
        additional_config={"lora_svd": {"expand": given.expand}},
    )


def in_turns(measure: Callable[[LLM], float], engines: Mapping[str, LLM], rounds: int) -> dict[str, float]:
    """The median of each model over rounds in which each has its turn, behind one that does not count."""
    turns = [{name: measure(llm) for name, llm in engines.items()} for _ in range(rounds + 1)][1:]
    medians = {name: statistics.median(turn[name] for turn in turns) for name in engines}
    ratio = statistics.median(turn["compact"] / turn["dense"] for turn in turns)
    return {**medians, "compact / dense": ratio}


def decoded(llm: LLM, batch: int, prompt: int, new: int) -> float:
    """Tokens a second that are written behind prompts, without the time that reading the prompts takes."""
    return batch * (new - 1) / (seconds(llm, batch, prompt, new) - seconds(llm, batch, prompt, 1))


def first_token(llm: LLM, prompt: int) -> float:
    return seconds(llm, 1, prompt, 1)


def seconds(llm: LLM, batch: int, prompt: int, new: int) -> float:
    """How long a batch of requests takes."""
    chosen = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    requests: Any = [
        {"prompt_token_ids": [(7 * row + place) % 1000 + 3 for place in range(prompt)]} for row in range(batch)
    ]
    start = time.perf_counter()
    llm.generate(requests, chosen, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
