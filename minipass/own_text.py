"""Text that a model writes itself, to train drafts on the text that they are for: `train_tiny.py --data self`.

It continues passages of the corpus. Where the model has a chat template, every second text answers a question about a
passage instead.
"""

from collections.abc import Sequence

import numpy as np
import tiktoken
from tqdm import tqdm

from minipass.chat import encode_chat
from minipass.decode import Plain
from minipass.engine import Engine
from minipass.model import GPT
from minipass.sampling import Sampling
from minipass.tokenizer import stop_tokens

BATCHES = {"cpu": 32, "cuda": 512}  # texts at once
N_NEW, N_PROMPT = 256, (16, 96)
QUESTIONS = (
    "Explain this in simple words:",
    "Summarise this:",
    "What is this about, and why does it matter?",
    "Write a short story about this:",
    "List the most important points of this:",
    "Write a Python function that does this:",
    "What should a beginner know about this?",
    "Give an example of this:",
)


def own_text(
    model: GPT, encoding: tiktoken.Encoding, chat_template: str | None, corpus: np.ndarray, n_tokens: int, seed: int
) -> np.ndarray:
    """Texts one after the other, (N,) uint32, with N about n_tokens; prompts are included and counted.

    corpus: (M,) tokens, from which the prompts are cut. Text is sampled as sample.py does, at T = 0.8 with top-k 10.
    """
    rng, engine, texts = np.random.default_rng(seed), Engine(model, Plain(), Sampling(0.8, top_k=10)), []
    longest, batch = min(N_PROMPT[1], model.config.block_size // 2), BATCHES[model.device.type]
    bar, written = tqdm(total=n_tokens, unit="token", desc="writing text", disable=None, leave=False), 0
    while written < n_tokens:
        prompts = [passage(corpus, longest, rng) for _ in range(batch)]
        if chat_template is not None:
            for b in range(0, batch, 2):
                question = f"{rng.choice(QUESTIONS)}\n\n{encoding.decode(prompts[b]).strip()}"
                prompts[b] = encode_chat(encoding, chat_template, [{"role": "user", "content": question}])
        result = engine.generate(prompts, N_NEW, stop_token=stop_tokens(encoding), seed=int(rng.integers(2**40)))
        texts += [np.array([*prompt, *new], np.uint32) for prompt, new in zip(prompts, result.tokens, strict=True)]
        new = sum(map(len, texts[-batch:]))
        written += new
        bar.update(new)
    bar.close()
    return np.concatenate(texts)


def passage(corpus: np.ndarray, longest: int, rng: np.random.Generator) -> Sequence[int]:
    """A random run of the corpus's tokens."""
    length = int(rng.integers(min(N_PROMPT[0], longest), longest + 1))
    start = int(rng.integers(max(1, len(corpus) - length)))
    return corpus[start : start + length].tolist()
