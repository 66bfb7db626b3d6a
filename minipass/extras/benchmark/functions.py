"""Python functions, to judge sampled text: heads of held-out functions are completed; does the result parse?"""

import ast
import re
from collections.abc import Iterable

import tiktoken
from tqdm import tqdm

from minipass.data import parsed
from minipass.engine import Engine
from minipass.tokenizer import encode_text, stop_tokens

BATCH = 32


def function_heads(texts: Iterable[str]) -> list[str]:
    """The heads, `def` to `:`, of all functions and methods in Python texts: each once, as ast.unparse writes them.

    A head has no line end: one token holds a line end of Python together with the next line's indentation.
    """
    heads = {}
    for node in (node for text in texts for node in ast.walk(parsed(text) or ast.Module([], []))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            bare = type(node)(node.name, node.args, [ast.Pass()], [], node.returns, lineno=0)
            heads[ast.unparse(bare).removesuffix("\n    pass")] = None
    return list(heads)


def complete(engine: Engine, encoding: tiktoken.Encoding, heads: list[str], n_new: int, seed: int) -> list[str]:
    """Completes the functions with these heads, each once, up to an end-of-text token or n_new tokens.

    Everything from the first line that is not indented is cut off. If there is no such line and the text has not ended,
    the last line is cut off, as it may be half a line.
    """
    stop, functions = stop_tokens(encoding), []
    for start in tqdm(range(0, len(heads), BATCH), unit="batch", disable=None):
        batch = heads[start : start + BATCH]
        prompts = [encode_text(encoding, head).tolist() for head in batch]
        made = engine.generate(prompts, n_new, stop_token=stop, seed=seed + start).tokens
        for head, tokens in zip(batch, made, strict=True):
            text = encoding.decode([token for token in tokens if token not in stop])
            inside, *after = re.split(r"\n(?=\S)", text, maxsplit=1)
            functions.append(head + (inside if after or tokens[-1] in stop else inside.rpartition("\n")[0]))
    return functions
