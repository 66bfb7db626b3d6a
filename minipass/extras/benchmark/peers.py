"""The same weights in Hugging Face transformers, and its `generate` in three forms, as contenders of the bench.

transformers is not needed otherwise: `pip install -e '.[peers]'`.
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence

import torch

from minipass import pretrained
from minipass.extras.benchmark.measuring import Contender, Sample, now
from minipass.model import GPT
from minipass.sampling import Sampling

TOLERANCE = 1e-3  # between float32 logits
PROMPT_LOOKUP = 10  # drafts of prompt lookup in its authors' examples


def installed() -> bool:
    """Whether transformers can be imported."""
    return importlib.util.find_spec("transformers") is not None


def version() -> str:
    """That of transformers."""
    return importlib.metadata.version("transformers")


def as_theirs(model: GPT):
    """The model as a GPT2LMHeadModel or LlamaForCausalLM of its dtype, on its device, which never stops by itself."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = pretrained.their_sizes(model) | {"bos_token_id": None, "eos_token_id": None}
    if model.config.llama:
        theirs = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        theirs = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu_new"))
    tensors = pretrained.their_weights(model)
    if model.config.tied:
        ((embedding,), _) = pretrained.parts("wte.weight", model.config)
        tensors["lm_head.weight"] = tensors[embedding]
    theirs.load_state_dict(tensors)
    return theirs.to(model.device, model.dtype).eval()


@torch.inference_mode()
def largest_difference(model: GPT, prompts: Sequence[Sequence[int]]) -> float:
    """Between our logits and theirs, both in float32, over the prompts. Raises RuntimeError when it is too large."""
    exact = GPT(model.config).to(model.device)
    exact.load_state_dict(model.state_dict())
    ids = torch.tensor(prompts, device=model.device)
    difference = (exact.eval()(ids) - as_theirs(exact)(ids).logits).abs().max().item()
    if not difference < TOLERANCE:
        raise RuntimeError(f"the logits of transformers differ by {difference:.1e}: nothing is timed")
    return difference


class FirstToken:
    """A streamer, as `generate` calls it: notes when the first tokens after the prompt were there, and how many."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls, self.n_first, self.time = device, 0, 0, 0.0

    def put(self, tokens: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.n_first, self.time = tokens.numel(), now(self.device)

    def end(self) -> None:
        pass


def contenders(
    model: GPT,
    draft: GPT | None,
    plain: Contender,
    max_new_tokens: int,
    lookahead: Sequence[int],
    sampling: Sampling,
    stop_tokens: Sequence[int] = (),
) -> tuple[list[Contender], float]:
    """`generate` plain, with the draft model as assistant, with prompt lookup; and the largest difference of logits.

    Assistant and lookup run with each number of drafts in `lookahead`, and as they are used without a thought: the
    assistant with the library's own settings, lookup with PROMPT_LOOKUP.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # it warns of greedy decoding with sampling's defaults
    shortest = min(map(len, plain.prompts))
    difference = largest_difference(model, [prompt[:shortest] for prompt in plain.prompts[:4]])
    theirs, sampled = as_theirs(model), sampling.temperature > 0
    choosing = {"temperature": sampling.temperature, "top_k": sampling.top_k} if sampled else {}

    def contender(name: str, n_drafts: int | None, assistant=None, **settings) -> Contender:
        def run(prompt: list[int], seed: int) -> Sample:
            if assistant is not None:  # what it learned about itself in other runs must not leak into this one
                assistant.generation_config = transformers.GenerationConfig(pad_token_id=0, **settings)
            streamer, ids = FirstToken(model.device), torch.tensor([prompt], device=model.device)
            arguments = {"assistant_model": assistant} if assistant is not None else settings
            torch.manual_seed(seed)  # it draws from the global generator
            began = now(model.device)
            out = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=sampled,
                **choosing,
                pad_token_id=0,
                streamer=streamer,
                eos_token_id=list(stop_tokens) or None,
                **arguments,
            )
            ended = now(model.device)
            tokens = out[0, len(prompt) :].tolist()
            return Sample(tokens, streamer.time - began, len(tokens) - streamer.n_first, ended - streamer.time)

        return Contender(name, plain.prompts, run, n_drafts, plain)

    found = [contender("HF plain", None)]
    if draft is not None:
        assistant = as_theirs(draft)
        found.append(contender("HF assistant, its defaults", None, assistant))
        for n_drafts in lookahead:
            settings = {"num_assistant_tokens": n_drafts, "num_assistant_tokens_schedule": "constant"}
            settings["assistant_confidence_threshold"] = 0.0
            found.append(contender("HF assistant", n_drafts, assistant, **settings))
    for n_drafts in dict.fromkeys([*lookahead, PROMPT_LOOKUP]):
        found.append(contender("HF prompt lookup", n_drafts, prompt_lookup_num_tokens=n_drafts))
    return found, difference
