"""The one-liner: `minipass.generate` takes plain arguments and makes the engine for one call."""

import inspect
from collections.abc import Sequence
from typing import Any

from minipass.decode import Fused, Method, Plain, TwoModels, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.model import GPT
from minipass.sampling import COUPLED, REJECTION, Sampling
from minipass.texts import Generation, Prompts, Seeds, StopTokens
from minipass.trees import DraftTree

DEFAULT_LOOKAHEAD = 2  # the fastest on a CPU for the shipped model (bench.py); where rows are cheap, 4 and more are
DEFAULT_LOOKUP = 10
DEFAULT_TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))  # auto.best_tree makes better ones from measured accuracy
MAKERS = {  # what each method takes, and how it is made
    "plain": lambda: Plain(),
    "two-pass": lambda lookahead=DEFAULT_LOOKAHEAD, rule=REJECTION, fixed_token=None: TwoPass(
        lookahead, rule, fixed_token
    ),
    "pass": lambda lookahead=DEFAULT_LOOKAHEAD, rule=COUPLED, lookup=0: Fused(lookahead, rule, lookup),
    "tree": lambda tree=DEFAULT_TREE, rule=COUPLED, lookup=0: Fused(as_tree(tree), rule, lookup),
    "two-models": lambda draft_model, lookahead=DEFAULT_LOOKAHEAD, rule=COUPLED: TwoModels(
        draft_model, lookahead, rule
    ),
    "prompt-lookup": lambda lookup=DEFAULT_LOOKUP, rule=COUPLED: Fused(0, rule, lookup),
}
METHODS = tuple(MAKERS)


def as_tree(tree: DraftTree | Sequence[int]) -> DraftTree:
    """A draft tree, or its parents, as a draft tree."""
    return tree if isinstance(tree, DraftTree) else DraftTree(tree)


def make_method(name: str, **drafting: Any) -> Method:
    """A method by its name, one of METHODS. drafting: as in `generate`; what is None is left out.

    Raises InputError for an unknown name, and for an argument that the method does not take.
    """
    if not isinstance(name, str) or name not in MAKERS:
        raise InputError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    given = {argument: value for argument, value in drafting.items() if value is not None}
    for argument in given.keys() - inspect.signature(MAKERS[name]).parameters.keys():
        raise InputError(f"{argument} is not for the method {name!r}")
    if name == "two-models" and "draft_model" not in given:
        raise InputError("the method 'two-models' needs a draft_model")
    if given.get("lookahead") == 0:
        raise InputError("lookahead must be at least 1, not 0")
    return MAKERS[name](**given)


def generate(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    method: str = "pass",
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Seeds = 0,
    stop_token: StopTokens = None,
    use_graphs: bool = False,
    **drafting: Any,
) -> Generation:
    """Continues one or several prompts; the text has exactly the distribution of plain decoding.

        >>> loaded = minipass.load("joint")
        >>> prompt = loaded.encoding.encode("def main(argv):")
        >>> result = minipass.generate(loaded.model, prompt, 100, temperature=0.8, top_k=10, seed=1)
        >>> print(loaded.encoding.decode(result.tokens[0]), result.tokens_per_pass, result.acceptance)

    prompts: token ids, or a list of such sequences of any lengths. max_new_tokens: the most for each prompt.
    method: "plain", "two-pass" (the paper's Algorithm 1), "pass" (fused: one pass verifies and drafts), "tree" (fused,
    several drafts for each position), "two-models" or "prompt-lookup".
    temperature, top_k, top_p: see Sampling; temperature 0 is greedy. seed: the same seed gives the same text; one
    number s gives text b the seed s + b. stop_token: one or several; a text ends with the first one and includes it.
    use_graphs: replay CUDA graphs.
    drafting: lookahead, the number L of drafts in a chain (default 2); tree, a DraftTree or its parents; rule,
    "coupled" (the text of plain decoding for this seed) or "rejection" (the paper's); lookup, the number of drafts
    copied where the text repeats itself; draft_model, a GPT, for "two-models"; fixed_token, an ordinary token in place
    of the look-ahead tokens, for "two-pass".

    Returns a Generation: tokens, counts of passes, acceptance by draft position. To see the text as it is written,
    or to call this often, make an Engine and use its `stream`. Raises InputError for anything out of bounds.
    """
    engine = Engine(model, make_method(method, **drafting), Sampling(temperature, top_k, top_p), use_graphs=use_graphs)
    return engine.generate(prompts, max_new_tokens, seed=seed, stop_token=stop_token)
