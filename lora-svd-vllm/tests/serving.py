"""What vLLM answers for a folder, in this process, compared with what transformers answered."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

SMALL = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "skip_tokenizer_init": True,
    "kv_cache_memory_bytes": 1 << 24,
    "disable_log_stats": True,
}


class Answer(NamedTuple):
    """What is written behind a prompt, and the log-probabilities of all tokens behind the first, of both."""

    prompt: list[int]
    written: list[int]
    log_probabilities: list[float]


def references(folder: Path) -> list[Answer]:
    return [Answer(**answer) for answer in json.loads(folder.with_name(f"{folder.name}.json").read_text())]


@contextmanager
def engine(folder: Path, **changes: Any) -> Iterator[LLM]:
    llm = LLM(model=str(folder), **{**SMALL, **changes})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def answers(
    llm: LLM, prompts: list[list[int]], new_tokens: int, adapter: LoRARequest | None = None, *, whole: bool = True
) -> list[Answer]:
    """Greedy. With ``whole`` the prompts' log-probabilities too, which fail on CPUs where adapters are enabled."""
    shown = {"prompt_logprobs": 0} if whole else {}
    chosen = SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=0, ignore_eos=True, detokenize=False, **shown
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], chosen, use_tqdm=False, lora_request=adapter
    )
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        written = list(output.outputs[0].token_ids)
        chances = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
        tokens = [*prompt[1:], *written][-len(chances) :]
        given = [of[token].logprob for token, of in zip(tokens, chances, strict=True)]
        found.append(Answer(prompt, written, given))
    return found


def difference(found: list[Answer], expected: list[Answer]) -> float:
    """The largest difference of two log-probabilities of the same token."""
    pairs = [(one.log_probabilities, other.log_probabilities) for one, other in zip(found, expected, strict=True)]
    shared = [(min(len(one), len(other)), one, other) for one, other in pairs]
    return max(abs(a - b) for n, one, other in shared for a, b in zip(one[-n:], other[-n:], strict=True))


def served(folder: Path, **changes: Any) -> tuple[float, bool]:
    """The largest difference of log-probabilities to transformers, and whether the greedy text is alike."""
    expected = references(folder)
    with engine(folder, **changes) as llm:
        found = answers(llm, [answer.prompt for answer in expected], len(expected[0].written))
    return difference(found, expected), [a.written for a in found] == [b.written for b in expected]


if __name__ == "__main__":  # a model in a process of its own: FOLDER, and the engine's options as JSON
    print(json.dumps(served(Path(sys.argv[1]), **json.loads(sys.argv[2]))))
