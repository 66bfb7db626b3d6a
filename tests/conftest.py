"""Tiny random models, a slow reference of the target distribution, and the chi-square test that the graders share."""

import copy

import pytest
import torch

from minipass.model import GPT, GPTConfig
from minipass.sampling import probabilities

torch.set_num_threads(1)  # the models are so small that a second thread only waits


def random_model(seed: int, std: float = 0.4, **sizes: int) -> GPT:
    """A float64 model with weights large enough for its distributions to be uneven and to differ from row to row."""
    defaults = {"vocab_size": 11, "block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_lookahead": 4}
    model = GPT(GPTConfig(**(defaults | sizes))).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> GPT:
    return random_model(seed=1)


@pytest.fixture(scope="session")
def draft_model() -> GPT:
    return random_model(seed=2, n_layer=1, n_lookahead=0)


@pytest.fixture(scope="session")
def lively_model() -> GPT:
    """A model whose greedy text goes on changing: with random weights alone it repeats one token for ever, and then a
    wrong position or a wrong cache length would not show."""
    model = random_model(seed=2)
    with torch.no_grad():
        for block in model.h:
            block.attn.c_proj.weight.mul_(3)  # what was read counts for more than the last token
            block.mlp.c_proj.weight.mul_(3)
        for name, parameter in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.fill_(1)
    return model


@pytest.fixture(scope="session")
def lively_draft(lively_model) -> GPT:
    """The same model but for some noise, so that it drafts well, not perfectly."""
    draft, generator = copy.deepcopy(lively_model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return draft


@torch.no_grad()
def sequence_probabilities(
    model: GPT, prompt: list[int], n_new: int, stop_token: int | None = None, **sampling
) -> dict[tuple, float]:
    """The exact probability of every continuation, one plain pass of the whole text at a time.

    A text ends after n_new tokens, or at stop_token; one that fills the window goes on from the window's last half.
    """
    growing, ended, block_size = {(): 1.0}, {}, model.config.block_size
    for n in range(n_new):
        texts, grown, n_context = list(growing), {}, len(prompt) + n
        while n_context >= block_size:
            n_context -= block_size - block_size // 2
        logits = model(torch.tensor([[*prompt, *text][-n_context:] for text in texts]))[:, -1]
        for text, after in zip(texts, probabilities(logits, **sampling).tolist(), strict=True):
            for token, probability in enumerate(after):
                if probability > 0:
                    goes_to = ended if token == stop_token else grown
                    goes_to[(*text, token)] = growing[text] * probability
        growing = grown
    return growing | ended


def chi_square_p_value(samples: list[tuple], expected: dict[tuple, float]) -> float:
    """How likely samples as unlike `expected` as these are; 0.0 when one has probability 0.

    Outcomes are pooled, the likely ones alone and the unlikely ones together, until 5 of each cell are expected.
    """
    if any(sample not in expected for sample in samples):
        return 0.0
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[sample] += 1
    cells, observed, probability = [], 0, 0.0
    for outcome in sorted(expected, key=expected.get):
        observed, probability = observed + counts[outcome], probability + expected[outcome]
        if probability * len(samples) >= 5:
            cells.append((observed, probability * len(samples)))
            observed, probability = 0, 0.0
    if probability > 0:
        last_observed, last_expected = cells.pop()
        cells.append((last_observed + observed, last_expected + probability * len(samples)))
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()
