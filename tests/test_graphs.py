"""Turns as CUDA graphs: no wait and no traffic inside (on a device without values), and the same texts (on a stand-in
of CUDA graphs, and on real ones where there is a GPU)."""

import copy

import pytest
import torch
from conftest import (
    METHODS,
    SPARSE,
    TREE,
    WAYS,
    chi_square_p_value,
    noisy,
    plain_text,
    random_lively_model,
    random_model,
    sequence_probabilities,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minipass import graphs
from minipass.decode import Decoder, Fused, Handed, copied_shape
from minipass.engine import GREEDY, Engine
from minipass.model import GPT, GPTConfig
from minipass.sampling import COUPLED, REJECTION, RULES, Sampling
from minipass.trees import DraftTree, Shape, chain

each_way = pytest.mark.parametrize("way", WAYS, ids=", ".join)


def recorded(way, model, draft_model, sampling=GREEDY) -> Engine:
    """An engine that records its turns."""
    method, rule = way
    return Engine(model, METHODS[method](3, rule, draft_model), sampling, use_graphs=True)


@pytest.fixture(scope="module")
def lively():
    """A model with a small window and its draft model."""
    model = random_lively_model(seed=2, block_size=16)
    return model, noisy(model)


class StandIn:
    """Does what graphs.Graph does, without CUDA: runs the function again, on the same memory each time."""

    def __init__(self, function, inputs, state):
        self.function, self.inputs = function, [each.clone() for each in inputs]
        before = [each.clone() for each in state]
        outputs = function(*self.inputs)
        for each, value in zip(state, before, strict=True):
            each.copy_(value)
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
    monkeypatch.setattr(graphs, "Graph", StandIn)
    monkeypatch.setattr(graphs, "available", lambda device: True)


CALLS = [[[1, 2, 3]], [[1, 2, 3], [4], [7] * 13], [[5] * 16, [6], [2, 2]]]


@pytest.fixture(scope="module")
def plain(lively):
    """What plain decoding writes for each of CALLS, up to token 3, greedy and sampled."""
    return {
        sampling: [[plain_text(lively[0], each, 24, sampling, b, [3]) for b, each in enumerate(call)] for call in CALLS]
        for sampling in (GREEDY, Sampling(0.8))
    }


@each_way
def test_recorded_turns_write_the_texts_of_plain_decoding(way, lively, plain, stand_in):
    sampling = Sampling(0.8) if way[1] == COUPLED else GREEDY
    engine = recorded(way, *lively, sampling)
    for call, texts in zip(CALLS, plain[sampling], strict=True):
        for _ in range(2):  # recorded, then found again
            assert engine.generate(call, 24, stop_token=3).tokens == texts
    assert {n: len(decoders) for n, decoders in engine.idle.items()} == {1: 1, 3: 1}, "one decoder for each size"


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)], ids=["greedy", "sampled"])
def test_recorded_turns_that_choose_their_drafts_write_the_texts_of_plain_decoding(sampling, lively, plain, stand_in):
    engine = Engine(lively[0], Fused(DraftTree(TREE.parents, keep=4)), sampling, use_graphs=True)
    for call, texts in zip(CALLS, plain[sampling], strict=True):
        for _ in range(2):
            assert engine.generate(call, 24, stop_token=3).tokens == texts


@pytest.mark.parametrize("way", [way for way in WAYS if way[1] == REJECTION], ids=", ".join)
def test_recorded_turns_write_the_texts_of_those_that_are_not_recorded(way, lively, stand_in):
    for call in CALLS:
        engines = (
            recorded(way, *lively, Sampling(1.0)),
            Engine(lively[0], METHODS[way[0]](3, way[1], lively[1]), Sampling(1.0)),
        )
        texts = [engine.generate(call, 24, seed=5, stop_token=3).tokens for engine in engines]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("rule", RULES)
def test_recorded_turns_have_exactly_the_enumerated_distribution(rule, stand_in):
    model = random_model(seed=5, std=0.5, n_lookahead=3, vocab_size=5, block_size=16, n_layer=1)
    texts = recorded(("fused", rule), model, None, Sampling(1.0)).generate([[1, 2, 3]] * 12_000, 3).tokens
    expected = sequence_probabilities(model, [1, 2, 3], 3, temperature=1.0)
    assert chi_square_p_value(list(map(tuple, texts)), expected) > 1e-3


@each_way
def test_records_of_recorded_turns_stay_what_they_were(way, lively, stand_in):
    turns, copies = [], []
    for turn in recorded(way, *lively, Sampling(1.0)).stream([[1, 2, 3], [4]], 30):
        turns.append(turn)
        copies.append(copy.deepcopy(turn))
    for turn, before in zip(turns, copies, strict=True):
        assert (turn.tokens, turn.origins, turn.draft_passes, turn.shape, turn.last) == (
            before.tokens, before.origins, before.draft_passes, before.shape, before.last,
        )  # fmt: skip
        pairs = zip(pytree.tree_leaves(turn.result), pytree.tree_leaves(before.result), strict=True)
        assert all(now is None or torch.equal(now, then) for now, then in pairs)


@each_way
def test_a_recording_engine_writes_the_same_text_for_the_same_seed(way, lively, stand_in):
    prompts, engine = [[1, 2, 3], [4]], recorded(way, *lively, Sampling(1.0))
    first, again, other = (engine.generate(prompts, 20, seed=seed).tokens for seed in (1, 1, 7))
    assert first == again or way == ("auto", REJECTION), "auto has learned from the first"
    assert first != other


def test_recorded_turns_read_few_more_slots_than_the_text_needs(stand_in):
    model = random_lively_model(seed=2, block_size=512)
    engine = recorded(("fused", COUPLED), model, None)
    for prompt, most in (([1, 2, 3], 64), ([4, 5], 64), ([3] * 200, 512)):  # of 3, 2 and 200 tokens, and 16 new ones
        assert engine.generate(prompt, 16).tokens == [plain_text(model, prompt, 16)]
        sizes = [decoder.cache.max_len for decoder in engine.idle[1]]
        assert max(sizes) <= most and all(size % 16 == 0 for size in sizes)
    assert len(sizes) == 2, "a new decoder is for a text that does not fit into those there"
    engine.generate([1, 2, 3], 16)
    assert len(engine.idle[1]) == 2, "a short text goes on with the small one"


def test_a_conversation_records_once_for_each_size(stand_in):
    model = random_lively_model(seed=2, block_size=512)
    engine = Engine(model, Fused(2), use_graphs=True, keep_cache=True)
    short, long, n_graphs = [1, 2, 3], [3] * 200, []
    for prompt in (short, long, short, long, short):
        assert engine.generate(prompt, 16).tokens == [plain_text(model, prompt, 16)]
        decoders = [*engine.idle[1], engine.last[0]]
        n_graphs.append(sum(len(decoder.graphs) for decoder in decoders))
    assert len({id(decoder) for decoder in decoders}) == len(decoders) == 2
    assert n_graphs[1] == n_graphs[-1], "all were recorded in the first two calls"


def test_two_streams_at_once_from_one_engine_do_not_share_a_decoder(lively, stand_in):
    engine, prompts = recorded(("fused", COUPLED), *lively), [[1, 2, 3], [4, 5, 6]]
    streams, texts = [engine.stream(prompt, 20) for prompt in prompts], [[], []]
    for _ in range(20):  # in turns
        for each, text in zip(streams, texts, strict=True):
            turn = next(each, None)
            text += turn.tokens[0] if turn else []
    assert texts == [plain_text(lively[0], prompt, 20) for prompt in prompts]


def test_a_stream_that_is_abandoned_leaves_the_engine_as_good_as_new(lively, stand_in):
    engine = recorded(("fused", COUPLED), *lively)
    abandoned = engine.stream([1, 2, 3], 20)
    next(abandoned)
    abandoned.close()
    assert engine.generate([4, 5, 6], 20).tokens == [plain_text(lively[0], [4, 5, 6], 20)]


# Nothing inside a turn waits for the device, or brings something from the host. The device here is `meta`, whose
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


SHAPES = {
    "plain": Shape(),
    "draft": Shape(n_lookahead=3),
    "verify": Shape(chain(3)),
    "fused chain": Shape(chain(3), 3),
    "fused tree": Shape(TREE, 3),
    "incomplete groups": Shape(SPARSE, 3),
    "chosen tree": Shape(DraftTree(TREE.parents, keep=4), 3),
    "copied": copied_shape(5, 3),
    "all copied": copied_shape(5, 0),
    "two models": Shape(chain(3)),
}
SOME, ALL = Sampling(0.8, top_k=3, top_p=0.9), Sampling(1.0)  # of the tokens


@torch.inference_mode()
@pytest.mark.parametrize(
    ("rule", "sampling"), [(COUPLED, GREEDY), *((rule, each) for rule in RULES for each in (SOME, ALL))]
)
@pytest.mark.parametrize("n_draft", [0, 8])
@pytest.mark.parametrize("name", SHAPES)
def test_a_turn_neither_waits_for_the_device_nor_brings_anything_from_the_host(name, n_draft, rule, sampling):
    sizes = {"vocab_size": 11, "block_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_draft": n_draft}
    models = [GPT(GPTConfig(n_lookahead=n, **sizes)).to("meta") for n in (4, 0)]
    if name == "chosen tree" and rule == REJECTION:
        pytest.skip("a Method refuses it")
    decoder = Decoder(models if name == "two models" else models[:1], sampling, rule, n_texts=2, max_len=120)
    root = torch.zeros(2, dtype=torch.int64, device="meta")
    hidden = torch.zeros(2, 0 if name == "all copied" else 3, 16, device="meta")
    handed = Handed(root, root, hidden, torch.zeros(2, 0, 11, device="meta"))
    copied = root[:, None].expand(2, 5) if "copied" in name else None
    decoder.turn(SHAPES[name], handed, copied)  # tables of indices come into being, as in the run before a recording
    with NoHostTensors(), NoHostIndices():
        decoder.turn(SHAPES[name], handed, copied)


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
@each_way
def test_graphs_write_the_texts_of_plain_decoding(way, lively):
    models, prompts = [copy.deepcopy(each).cuda() for each in lively], [[1, 2, 3], [4], [7] * 13]
    for sampling in (GREEDY, Sampling(0.8)) if way[1] == COUPLED else (GREEDY,):
        engine = recorded(way, *models, sampling)
        expected = [plain_text(lively[0], prompt, 24, sampling, seed) for seed, prompt in enumerate(prompts)]
        for _ in range(2):
            assert engine.generate(prompts, 24).tokens == expected


@needs_cuda
@each_way
def test_a_recorded_turn_waits_for_the_device_once(way, lively):
    engine = recorded(way, *(copy.deepcopy(each).float().cuda() for each in lively), Sampling(1.0))
    engine.generate([1, 2, 3], 24)  # the second time, with the same draws, the graphs of all methods but auto are there
    (decoder,) = engine.idle[1]
    turns = engine.stream([1, 2, 3], 24)
    for _ in range(2):
        next(turns)
    activities, n_graphs = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA], None
    while n_graphs != len(decoder.graphs):  # a turn that records one waits more often
        n_graphs = len(decoder.graphs)
        with torch.profiler.profile(activities=activities) as profile:
            next(turns)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.get("cudaStreamSynchronize", 0) == 1
    assert "aten::_local_scalar_dense" not in counts
