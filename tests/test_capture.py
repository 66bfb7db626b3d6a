"""Captured rounds: no wait and no traffic inside (on a device without values), and the same texts (on a stand-in of
CUDA graphs, and on real ones where there is a GPU)."""

import pytest
import torch
from conftest import chi_square_p_value, random_model, sequence_probabilities
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minipass import capture
from minipass.decoder import Decoder
from minipass.generate import RULES, generate, stream
from minipass.layout import DraftTree, chain
from minipass.model import GPT, GPTConfig
from minipass.rounds import copied_chain, draft_pass, fused_round, plain_pass, speculative_round, verify_pass

TREE = DraftTree((0, 0, 0, 1, 1, 2, 4))
SPARSE = DraftTree(TREE.parents, groups=(3, 1, 2, 0, 0, 1, 0, 0))
WAYS = {
    "autoregressive": {"method": "autoregressive"},
    "two-pass": {"method": "pass-two-pass", "lookahead": 3},
    "fused": {"method": "pass", "lookahead": 3},
    "tree, matching": {"method": "pass-tree", "tree": TREE, "rule": "matching"},
    "tree, recursive": {"method": "pass-tree", "tree": TREE, "rule": "recursive"},
    "tree with incomplete groups": {"method": "pass-tree", "tree": SPARSE},
    "copying": {"method": "pass", "lookahead": 2, "prompt_lookup": 4},
    "prompt lookup": {"method": "prompt-lookup"},
    "two models": {"method": "speculative", "lookahead": 3},
}


class StandIn:
    """Does what capture.Graph does, without CUDA: runs the function again, on the same memory each time."""

    def __init__(self, function, inputs, state, generator):
        self.function, self.inputs = function, [each.clone() for each in inputs]
        before, random_before = [each.clone() for each in state], generator.get_state()
        outputs = function(*self.inputs)
        for each, value in zip(state, before, strict=True):
            each.copy_(value)
        generator.set_state(random_before)
        self.outputs = pytree.tree_map_only(torch.Tensor, lambda each: each.clone().fill_(0), outputs)

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        new = pytree.tree_leaves(self.function(*self.inputs))
        for own, value in zip(pytree.tree_leaves(self.outputs), new, strict=True):
            if isinstance(own, torch.Tensor):
                own.copy_(value)
        return self.outputs


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(capture, "Graph", StandIn)
    monkeypatch.setattr(capture, "available", lambda device: True)


@pytest.mark.parametrize("way", WAYS)
def test_captured_rounds_write_the_same_greedy_texts(way, lively_model, lively_draft, stand_in):
    captures = {}
    settings = {**WAYS[way], "draft_model": lively_draft, "stop_token": 3}
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4], [7] * 37], [[5] * 39, [6], [2, 2]]):  # the latter past the window
        plain = generate(lively_model, prompts, 50, method="autoregressive", stop_token=3).tokens
        for _ in range(2):  # recorded, then found again
            assert generate(lively_model, prompts, 50, captures=captures, **settings).tokens == plain
    assert len(captures) == 2, "one decoder for one text, one for three"


@pytest.mark.parametrize("way", WAYS)
def test_captured_rounds_have_exactly_the_enumerated_distribution(way, stand_in):
    model = random_model(seed=5, std=0.5, vocab_size=5, block_size=16, n_layer=1, n_lookahead=3)
    draft_model = random_model(seed=6, vocab_size=5, block_size=16, n_layer=1, n_lookahead=0)
    settings = {**WAYS[way], "draft_model": draft_model, "temperature": 1.0, "captures": {}}
    result = generate(model, [[1, 2, 3]] * 12_000, 4, generator=torch.Generator().manual_seed(0), **settings)
    samples = [tuple(tokens) for tokens in result.tokens]
    assert chi_square_p_value(samples, sequence_probabilities(model, [1, 2, 3], 4, temperature=1.0)) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_records_of_captured_rounds_stay_what_they_were_and_count_their_passes(
    way, lively_model, lively_draft, stand_in
):
    settings = {**WAYS[way], "draft_model": lively_draft, "temperature": 1.0, "captures": {}}
    generator = torch.Generator().manual_seed(1)
    kept_records, copies = [], []
    for record in stream(lively_model, [[1, 2, 3], [4]], 30, generator=generator, **settings):
        kept_records.append(record)
        copies.append(None if record.drafts is None else (record.drafts.clone(), record.target_probs.clone()))
        assert record.passes
    for record, copy in zip(kept_records, copies, strict=True):
        if copy:
            assert torch.equal(record.drafts, copy[0])
            assert torch.equal(record.target_probs, copy[1])
    generator.manual_seed(1)
    again = generate(lively_model, [[1, 2, 3], [4]], 30, generator=generator, **settings)
    assert again.tokens == [[t for record in kept_records for t in record.tokens[b]] for b in range(2)]
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state()), "the caller's moves on"


def test_two_generations_at_once_do_not_share_a_decoder(lively_model, stand_in):
    captures, prompts = {}, [[1, 2, 3], [4, 5, 6]]
    plain = [generate(lively_model, prompt, 20, method="autoregressive").tokens[0] for prompt in prompts]
    streams, texts = [stream(lively_model, prompt, 20, captures=captures) for prompt in prompts], [[], []]
    for _ in range(20):  # in turns
        for each, text in zip(streams, texts, strict=True):
            record = next(each, None)
            text += record.tokens[0] if record else []
    assert texts == plain


# Nothing inside a round waits for the device, or brings something from the host. The device here is `meta`, whose
# tensors have shapes and no values: reading one is an error.


class NoHostTensors(TorchDispatchMode):
    """Refuses operations with a tensor on the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        seen = [each for each in pytree.tree_leaves((args, kwargs, result)) if isinstance(each, torch.Tensor)]
        assert all(each.is_meta for each in seen), f"{function} touches the host"
        return result


class NoHostIndices(TorchFunctionMode):
    """Refuses lists of numbers as indices, which the other mode does not see, since they become tensors on the way."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(each, list | tuple) for each in index), "a list as index"
        return function(*args, **(kwargs or {}))


ROUNDS = {
    "plain": lambda root, logits: (plain_pass, root),
    "draft pass": lambda root, logits: (draft_pass, torch.arange(11, 14, device="meta"), root),
    "verify pass": lambda root, logits: (verify_pass, root, logits),
    "fused chain": lambda root, logits: (fused_round, chain(3), 3, root, logits),
    "fused tree": lambda root, logits: (fused_round, TREE, 3, root, logits),
    "incomplete groups": lambda root, logits: (fused_round, SPARSE, 3, root, logits),
    "copied": lambda root, logits: (fused_round, copied_chain(5, 3), 3, root, logits, root[:, None].expand(2, 5)),
    "two models": lambda root, logits: (speculative_round, 3, root, root),
}
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.0, "top_p": 0.9}]


@torch.inference_mode()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ROUNDS)
def test_a_round_neither_waits_for_the_device_nor_brings_anything_from_the_host(name, rule, sampling):
    sizes = {"vocab_size": 11, "block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model, draft_model = (GPT(GPTConfig(n_lookahead=n, **sizes)).to("meta") for n in (4, 0))
    decoder = Decoder(model, 2, 120, rule=rule, sampling=sampling, draft_model=draft_model)
    root = torch.zeros(2, dtype=torch.int64, device="meta")
    function, *arguments = ROUNDS[name](root, torch.zeros(2, 3, 11, device="meta"))
    function(decoder, *arguments)  # tables of indices come into being, as in the run before a recording
    with NoHostTensors(), NoHostIndices():
        function(decoder, *arguments)


def test_the_check_for_traffic_sees_what_it_should():
    there = torch.zeros(3, device="meta")
    with NoHostTensors(), NoHostIndices():
        there[there.long()]
        with pytest.raises(AssertionError):
            there[[0, 1]]
        with pytest.raises(AssertionError):
            torch.tensor([1, 2]).to("meta")
        with pytest.raises((RuntimeError, NotImplementedError)):
            there.sum().item()


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_graphs_write_the_texts_of_plain_decoding(way, lively_model, lively_draft):
    model, draft_model = (GPT(each.config).double() for each in (lively_model, lively_draft))
    for copy, original in ((model, lively_model), (draft_model, lively_draft)):
        copy.load_state_dict(original.state_dict())
        copy.cuda().eval()
    prompts, captures = [[1, 2, 3], [4], [7] * 37], {}
    plain = generate(lively_model, prompts, 50, method="autoregressive").tokens
    settings = {**WAYS[way], "draft_model": draft_model, "captures": captures}
    for _ in range(2):
        assert generate(model, prompts, 50, **settings).tokens == plain
    generator = torch.Generator("cuda").manual_seed(0)
    sampled = [generate(model, prompts, 20, temperature=1.0, generator=generator, **settings).tokens for _ in range(2)]
    assert sampled[0] != sampled[1]


@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_a_captured_round_waits_for_the_device_once(way, lively_model, lively_draft):
    model, draft_model = (GPT(each.config).cuda().eval() for each in (lively_model, lively_draft))
    settings = {**WAYS[way], "draft_model": draft_model, "captures": {}, "temperature": 1.0}
    for recorded in (False, True):  # the second time, with the same draws, all graphs are there
        rounds = stream(model, [1, 2, 3], 30, generator=torch.Generator("cuda").manual_seed(0), **settings)
        if not recorded:
            list(rounds)
    for _ in range(3):
        next(rounds)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        next(rounds)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaStreamSynchronize", 0) == 1
    assert "aten::_local_scalar_dense" not in counts
