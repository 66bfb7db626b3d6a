"""minipass: Parallel Speculative Sampling (PaSS, arXiv 2311.13581) from scratch, and past the paper.

import minipass
loaded = minipass.load("joint")
result = minipass.generate(loaded.model, loaded.encoding.encode("def main(argv):"), 100)
print(loaded.encoding.decode(result.tokens[0]), result.tokens_per_pass)
"""

from minipass.api import generate, make_method
from minipass.auto import AdaptiveTree, Auto, best_tree, likeliest_tree
from minipass.decode import Fused, Plain, TwoModels, TwoPass
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.model import GPT, GPTConfig, KVCache
from minipass.pretrained import from_pretrained
from minipass.sampling import Sampling
from minipass.texts import Generation, Turn
from minipass.trees import DraftTree, chain
from minipass.weights import Checkpoint, load, save, save_pretrained

__all__ = [
    "GPT", "AdaptiveTree", "Auto", "Checkpoint", "DraftTree", "Engine", "Fused", "GPTConfig", "Generation",
    "InputError", "KVCache", "Plain", "Sampling", "Turn", "TwoModels", "TwoPass", "best_tree", "chain",
    "from_pretrained", "generate", "likeliest_tree", "load", "make_method", "save", "save_pretrained",
]  # fmt: skip
