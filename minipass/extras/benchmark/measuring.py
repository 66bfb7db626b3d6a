"""How bench.py measures: contenders take turns within each prompt, and what is reported are paired ratios.

A slow moment of the machine thus meets all contenders alike. The clock starts when the first turn's token is there:
prefill, which is the same for all, is timed apart. Each contender first runs once untimed. Passes over a given number
of rows are timed in the same way, by turns.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from minipass import graphs
from minipass.decode import Decoder, Engine
from minipass.model import GPT, KVCache
from minipass.sampling import COUPLED, Sampling
from minipass.texts import Generation
from minipass.trees import Shape, chain

NGRAM = 8


@dataclass(frozen=True)
class Sample:
    """One prompt continued once.

    tokens: the new ones; first_seconds: until the first were there, prefill included; n_decoded, seconds: the tokens
    after these, and their time. counts: of our methods. passes: after the first turn, (model, rows) of each forward
    pass, see texts.Turn.
    """

    tokens: list[int]
    first_seconds: float
    n_decoded: int
    seconds: float
    counts: Generation | None = None
    passes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second, prefill not counted; NaN when the first ones were all."""
        return self.n_decoded / self.seconds if self.n_decoded else math.nan


@dataclass(frozen=True, eq=False)
class Contender:
    """One row of a table. run(prompt, seed) continues a prompt; baseline: what it is compared with, None for itself."""

    name: str
    prompts: list[list[int]]
    run: Callable[[list[int], int], Sample]
    lookahead: int | None = None
    baseline: "Contender | None" = None


def ours(
    name: str,
    engine: Engine,
    prompts: list[list[int]],
    max_new_tokens: int,
    lookahead: int | None = None,
    baseline: Contender | None = None,
    stop_tokens: Sequence[int] = (),
) -> Contender:
    """A contender that is one of our methods."""

    def run(prompt: list[int], seed: int) -> Sample:
        device, counts, passes = engine.models[0].device, Generation(), []
        began = now(device)
        turns = engine.stream(prompt, max_new_tokens, stop_token=stop_tokens, seed=seed)
        counts.add(next(turns))
        first, n_first = now(device), len(counts.tokens[0])
        for turn in turns:
            counts.add(turn)
            passes += turn.passes
        seconds, tokens = now(device) - first, counts.tokens[0]
        return Sample(tokens, first - began, len(tokens) - n_first, seconds, counts, passes)

    return Contender(name, prompts, run, lookahead, baseline)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def take_turns(contenders: Sequence[Contender], seed: int, title: str) -> list[list[Sample]]:
    """Runs every contender on every prompt; for each contender its samples, in the order of its prompts.

    Within a prompt the contenders take turns, beginning with another one each time. The first prompt is run twice, and
    only its second run counts.
    """
    samples: list[list[Sample]] = [[] for _ in contenders]
    turns = range(min(len(each.prompts) for each in contenders))
    for index in tqdm([-1, *turns], desc=title, unit="prompt", dynamic_ncols=True):
        for place in range(len(contenders)):
            which = (place + index) % len(contenders)
            contender = contenders[which]
            sample = contender.run(contender.prompts[max(index, 0)], seed + max(index, 0))
            if index >= 0:
                samples[which].append(sample)
    return samples


def figures(contenders: Sequence[Contender], samples: Sequence[Sequence[Sample]]) -> list[dict]:
    """What a table shows of each contender, as plain values. `speedup`: quartiles of the paired ratios of the rates."""
    rows = []
    for contender, own in zip(contenders, samples, strict=True):
        base = samples[contenders.index(contender.baseline)] if contender.baseline else own
        counts = [sample.counts for sample in own if sample.counts]
        n_passes = sum(each.prompt_passes for each in counts)
        rows.append(
            {
                "method": contender.name,
                "lookahead": contender.lookahead,
                "tokens_per_pass": sum(len(c.tokens[0]) for c in counts) / n_passes if counts else None,
                "accepted_by_position": accepted_by_position(counts),
                "speedup": paired_quartiles([s.rate for s in own], [s.rate for s in base]),
                "tokens_per_second": quartiles([s.rate for s in own]),
                "first_seconds": quartiles([s.first_seconds for s in own]),
                "repeated_8grams": float(np.mean([repeated_share(s.tokens) for s in own])),
                "same_text": float(np.mean([s.tokens == b.tokens for s, b in zip(own, base, strict=True)])),
            }
        )
    return rows


def accepted_by_position(counts: Sequence[Generation]) -> list[float]:
    """Of the drafts that were made at each position in all generations together, the share that was accepted."""
    length = max((len(each.tested) for each in counts), default=0)
    tested, accepted = np.zeros(length), np.zeros(length)
    for each in counts:
        tested[: len(each.tested)] += each.tested
        accepted[: len(each.accepted)] += each.accepted
    return (accepted / np.maximum(tested, 1)).tolist()


def quartiles(values: Sequence[float]) -> list[float]:
    """The 25th, 50th and 75th percentile, without NaN; three zeros where nothing is left."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return np.percentile(values, [25, 50, 75]).tolist() if len(values) else [0.0] * 3


def paired_quartiles(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Quartiles of value / base, prompt by prompt: not the ratio of the medians."""
    return quartiles(np.asarray(values, dtype=float) / np.asarray(base, dtype=float))


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share, 95% by default: good also near 0 and 1, unlike share +- z x standard error."""
    share, spread = successes / trials, z * z / trials
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 8-grams of a text that were in it before: small models loop, and loops flatter acceptance."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def predicted_speedup(n_decoded: int, passes: Sequence[tuple[int, int]], cost: dict[tuple[int, int], float]) -> float:
    """The cost model: tokens/pass x t(1 row) / t(rows), with the passes that were made instead of an average one.

    cost: by (model, rows), the time of such a pass in times of the target's pass over 1 row.
    """
    return n_decoded / sum(cost[each] for each in passes)


def seconds_in_turns(
    actions: Sequence[Callable[[], object]], repeats: int, device: torch.device, title: str
) -> np.ndarray:
    """Seconds of actions that take turns: (repeats, actions). Each goes once untimed before."""
    seconds = np.zeros((1 + repeats, len(actions)))
    for row in tqdm(seconds, desc=title, unit="turn", leave=False, dynamic_ncols=True):
        for column, action in enumerate(actions):
            began = now(device)
            action()
            row[column] = now(device) - began
    return seconds[1:]


@torch.inference_mode()
def pass_seconds(
    models: Sequence[GPT], kinds: Sequence[tuple[int, int]], context: int, repeats: int, use_graphs: bool = False
) -> np.ndarray:
    """Seconds of passes of each kind, (model, rows), after `context` cached tokens: (repeats, kinds)."""
    device, most = models[0].device, max(rows for _, rows in kinds)
    caches = [KVCache(each.config, 1, context + most, device=device, dtype=each.dtype) for each in models]
    for cache in caches:
        cache.length += context
    passes = []
    for which, rows in kinds:
        ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
        one_pass = partial(models[which], layout=Shape(chain(rows - 1)).on(device).layout, cache=caches[which])
        passes.append(partial(graphs.Graph(one_pass, [ids], []) if use_graphs else one_pass, ids))
    return seconds_in_turns(passes, repeats, device, "passes")


@torch.inference_mode()
def prefill_seconds(model: GPT, prompts: Sequence[list[int]]) -> list[float]:
    """Of each prompt, what comes before its first turn."""

    def prefill(prompt: list[int]) -> None:
        Decoder([model], Sampling(), COUPLED, 1, len(prompt)).begin([prompt], [0], [0])

    prefills = [partial(prefill, prompt) for prompt in prompts]
    return seconds_in_turns(prefills, 1, model.device, "prefill")[0].tolist()


def memory_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 5) -> float:
    """Bytes per second at which memory is read: the best of a few sums over a float32 tensor too large for caches."""
    large = torch.ones(megabytes * 2**20 // 4, device=device)
    return large.nbytes / seconds_in_turns([large.sum], repeats, device, "memory").min()
