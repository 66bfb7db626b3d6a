"""How bench.py measures: contenders take turns within each prompt, and the bench reports paired ratios.

So a slow moment of the machine meets all contenders alike. The clock starts when the first turn's tokens are there:
everything before that, mostly prefill, is timed apart.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from timeit import timeit
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minipass.engine import Engine
from minipass.texts import Generation, Prompts, Turn

NGRAM, WARM_UPS = 8, 3


class Sample(NamedTuple):
    """One prompt, or a batch of them, continued once.

    texts: the new tokens of each prompt. milliseconds: until the first tokens were there, prefill included. rate:
    tokens per second after these, over all texts; NaN if none came after. turns: only of our methods.
    """

    texts: list[list[int]]
    milliseconds: float
    rate: float
    turns: Sequence[Turn] = ()


Run = Callable[[Prompts, int, int], Sample]  # of a prompt or a batch of them, a number of new tokens, and a seed


def sample(texts: list[list[int]], n_first: int, began: float, first: float, ended: float, turns=()) -> Sample:
    """A Sample from three times in seconds: its beginning, when the first n_first tokens were there, and its end."""
    n_decoded = sum(map(len, texts)) - n_first
    return Sample(texts, 1000 * (first - began), n_decoded / (ended - first) if n_decoded else math.nan, turns)


def ours(engine: Engine, stop_tokens: Sequence[int] = ()) -> Run:
    """A run that continues prompts with one of our methods."""

    def run(prompts: Prompts, n_new: int, seed: int) -> Sample:
        made, turns, first, n_first = Generation(), [], 0.0, 0
        began = now()
        for turn in engine.stream(prompts, n_new, stop_token=stop_tokens, seed=seed):
            made.add(turn)
            turns.append(replace(turn, result=None))  # its tensors would fill the memory
            if len(turns) == 1:
                first, n_first = now(), sum(map(len, made.tokens))
        return sample(made.tokens, n_first, began, first, now(), turns)

    return run


def now() -> float:
    """The time in seconds, once the device has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(
    runs: Sequence[Run], prompts: Sequence[Prompts], n_new: int, seed: int, title: str, warm_up: int
) -> list[list[Sample]]:
    """Every run on every prompt. Returns for each run its samples, in the order of the prompts.

    For each prompt the runs go one after the other, each time beginning with another one. Before that, each run goes
    once untimed, on the first prompt for warm_up tokens.
    """
    samples: list[list[Sample]] = [[run(prompts[0], warm_up, seed)][1:] for run in runs]
    for index, prompt in enumerate(tqdm(prompts, desc=title, unit="prompt", disable=None)):
        for which in np.roll(range(len(runs)), -index):
            samples[which].append(runs[which](prompt, n_new, seed + index))
    return samples


def figures(samples: Sequence[Sample], base: Sequence[Sample]) -> dict:
    """The figures of one contender, as plain values. base: the samples that it is compared with.

    Three numbers are quartiles over prompts; `speedup` has those of the ratio of the rates for each prompt.
    """
    counts, rates = Generation(), [each.rate for each in samples]
    for turn in (turn for each in samples for turn in each.turns):
        counts.add(turn)
    return {
        "tokens_per_pass": counts.tokens_per_pass or None,
        "accepted_by_position": counts.acceptance,
        "speedup": quartiles(np.divide(rates, [each.rate for each in base])),
        "tokens_per_second": quartiles(rates),
        "first_ms": quartiles([each.milliseconds for each in samples]),
        "repeated_8grams": float(np.mean([repeated_share(text) for each in samples for text in each.texts])),
        "same_text": float(np.mean([a.texts == b.texts for a, b in zip(samples, base, strict=True)])),
    }


def quartiles(values: Sequence[float]) -> tuple[float, ...]:
    """The 25th, 50th and 75th percentile of the values that are not NaN; three zeros if there are none."""
    values = np.array(values, dtype=float)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, [25, 50, 75]).tolist()) if len(values) else (0.0,) * 3


def wilson_interval(successes: int, trials: int) -> tuple[float, float, float]:
    """(low, share, high) by Wilson's interval, 95%. Unlike +- z x standard error it holds near 0 and 1."""
    z = 1.959964
    share, spread = successes / trials, z * z / trials
    middle, half = share + spread / 2, z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, (middle - half) / (1 + spread)), share, min(1.0, (middle + half) / (1 + spread))


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of a text's 8-grams that occurred in it before: small models loop, and loops raise acceptance."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.inference_mode()
def seconds_in_turns(actions: Sequence[Callable[[], object]], repeats: int) -> np.ndarray:
    """Seconds of actions that take turns: (repeats, actions). Before, each runs WARM_UPS times untimed."""
    turns = range(WARM_UPS + repeats)
    return np.array([[timeit(action, timer=now, number=1) for action in actions] for _ in turns])[WARM_UPS:]
