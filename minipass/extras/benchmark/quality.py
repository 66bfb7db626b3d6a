"""Is sampled text as good with PaSS as without? Heads of held-out functions, completed, cut, parsed, and scored."""

import ast
import math
import warnings
from collections.abc import Iterable

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from minipass.decode import Engine
from minipass.extras.benchmark.measuring import wilson_interval
from minipass.model import GPT
from minipass.tokenizer import encode_text

BATCH = 32


def function_heads(texts: Iterable[str]) -> list[str]:
    """The heads, `def` to `:`, of all functions and methods in Python texts: each once, without indentation.

    A head keeps no line end: tokens of Python hold it together with the indentation of the next line. Functions whose
    body is in the head's last line, and texts that do not parse, are left out.
    """
    heads = {}
    for text in texts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's opinion of other people's escapes
                nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        lines = text.split("\n")  # not splitlines: a form feed ends no line of Python's
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = lines[node.lineno - 1 : node.body[0].lineno - 1]
            while body and (not body[-1].strip() or body[-1].lstrip().startswith("#")):
                body.pop()  # blank lines and remarks before the first statement
            if body and body[-1].endswith(":"):
                heads["\n".join(line[node.col_offset :] for line in body)] = None
    return list(heads)


def usable_heads(heads: Iterable[str], encoding: tiktoken.Encoding, most: int) -> list[tuple[str, list[int]]]:
    """Heads with their tokens, those of at most `most` tokens."""
    encoded = [(head, encode_text(encoding, head).tolist()) for head in heads]
    return [(head, tokens) for head, tokens in encoded if len(tokens) <= most]


def cut_function(head: str, completion: str) -> str:
    """Head and completion up to the function's end: before the first line after the head that is not indented.

    Where there is no such line, the text ended on the way: its last line, which may be half a line, is dropped.
    """
    lines = (head + completion).split("\n")
    first = head.count("\n") + 1
    for number in range(first, len(lines)):
        if lines[number].strip() and not lines[number][0].isspace():
            return "\n".join(lines[:number])
    return "\n".join(lines[:-1])


def parses(code: str) -> bool:
    """Whether it is Python, by `ast`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@torch.inference_mode()
def log_likelihood(model: GPT, prompts: list[list[int]], texts: list[list[int]]) -> list[float]:
    """For each prompt the mean log-probability, in nats, of its text's tokens under plain next-token prediction."""
    longest = max(len(prompt) + len(text) for prompt, text in zip(prompts, texts, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt, text in zip(ids, prompts, texts, strict=True):
        row[: len(prompt) + len(text)] = torch.tensor(prompt + text)
    ids = ids.to(model.device)
    log_p = model(ids[:, :-1]).float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)  # (B, longest - 1)
    pairs = zip(log_p, prompts, texts, strict=True)
    return [row[len(prompt) - 1 : len(prompt) - 1 + len(text)].mean().item() for row, prompt, text in pairs]


def judge(
    engine: Engine,
    encoding: tiktoken.Encoding,
    heads: list[tuple[str, list[int]]],
    max_new_tokens: int,
    seed: int,
    title: str,
) -> dict:
    """Completes each head once. A text ends at the end-of-text token, which is not judged.

    Returns `samples`; `parses`, the share that does, with its 95% `interval`; `log_likelihood`, the mean over samples
    of the mean per token, with the `half_width` of its 95% interval.
    """
    n_parsed, likelihoods, stop = 0, [], encoding.eot_token
    for start in tqdm(range(0, len(heads), BATCH), desc=title, unit="batch", dynamic_ncols=True):
        batch = heads[start : start + BATCH]
        prompts = [tokens for _, tokens in batch]
        made = engine.generate(prompts, max_new_tokens, stop_token=stop, seed=seed + start).tokens
        likelihoods += log_likelihood(engine.models[0], prompts, made)
        for (head, _), tokens in zip(batch, made, strict=True):
            ended = tokens[-1] == stop
            completion = encoding.decode(tokens[:-1] if ended else tokens)
            n_parsed += parses(head + completion if ended else cut_function(head, completion))
    return {
        "samples": len(heads),
        "parses": n_parsed / len(heads),
        "interval": wilson_interval(n_parsed, len(heads)),
        "log_likelihood": float(np.mean(likelihoods)),
        "half_width": 1.96 * float(np.std(likelihoods)) / math.sqrt(len(heads)),
    }
