"""The loop over turns: an `Engine` is made once from a model, a method and settings, and writes many texts.

This is the host's side. Each window of a text begins with a prefill. Then the method's schedule gives the shape of each
turn, the Decoder runs it (decode.py), and the texts take the tokens that it made (texts.py): the turn's one host sync.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from minipass import graphs, kernels
from minipass.decode import Decoder, Fused, Handed, Method
from minipass.errors import InputError, whole
from minipass.model import GPT
from minipass.sampling import COUPLED, Sampling
from minipass.texts import Generation, Prompts, Seeds, StopTokens, Texts, Turn

FUSED, GREEDY = Fused(), Sampling()  # the defaults


class Engine:
    """A model, a method and settings, made once and used for many texts. Each text has exactly the target distribution.

    method: Plain(), TwoPass(..), Fused(..), TwoModels(..) or auto.Auto(..). sampling: greedy by default.
    use_graphs: on CUDA, turns are recorded as graphs and replayed.
    keep_cache: the beginning that a prompt shares with the text before it is not computed again, as in a chat.
    Raises InputError where the model does not fit the method.
    """

    def __init__(
        self, model: GPT, method: Method = FUSED, sampling: Sampling = GREEDY, *,
        use_graphs: bool = False, keep_cache: bool = False,
    ) -> None:  # fmt: skip
        for given, kind in ((model, GPT), (method, Method), (sampling, Sampling)):
            if not isinstance(given, kind):
                raise InputError(f"an Engine needs a {kind.__name__} here, not {given!r:.60}")
        config, token, drafter = model.config, method.fixed_token, method.draft_model
        ahead = max(shape.n_lookahead for shape in method.largest)
        width = max(shape.tree.width for shape in method.largest)
        if token is not None:
            whole(token, "fixed_token", 0, config.vocab_size - 1)
        elif ahead > config.n_lookahead:
            raise InputError(f"the method needs {ahead} look-ahead tokens, but the model has {config.n_lookahead}")
        if width > config.vocab_size:
            raise InputError(f"the tree has {width} drafts for one place, the vocabulary only {config.vocab_size}")
        if drafter is not None and (
            drafter.config.vocab_size != config.vocab_size
            or drafter.config.block_size < config.block_size
            or drafter.device != model.device
        ):
            raise InputError("the draft model must have the model's vocabulary and device, and no smaller window")
        if keep_cache and drafter is not None:
            raise InputError("keep_cache is for methods with one model")
        if use_graphs and not graphs.available(model.device):
            raise InputError(f"turns can be recorded as graphs on CUDA only, not on {model.device}")
        model = model if token is None else model.with_lookahead(model.wte.weight[[token] * ahead])
        self.models = [model] if drafter is None else [model, drafter]
        for each in self.models:
            kernels.pack(each.matrices())
        self.method, self.sampling, self.use_graphs = method, sampling, use_graphs
        self.keep_cache = keep_cache
        self.last: tuple[Decoder | None, list[int]] = None, []  # with keep_cache, and what its cache holds
        self.idle: dict[int, list[Decoder]] = defaultdict(list)  # with recorded graphs, by number of texts

    def stream(
        self, prompts: Prompts, max_new_tokens: int, *, stop_token: StopTokens = None, seed: Seeds = 0
    ) -> Iterator[Turn]:
        """Continues one or several prompts, yielding a record of each turn.

        prompts: a sequence of token ids, or a list of such sequences of any lengths. Each text ends after
        max_new_tokens, or with a stop token (one or several), which is emitted. seed: a number for each text, or one
        number s, which gives text b the seed s + b. Under the coupled rule, and when greedy, a text depends on
        weights, prompt and seed alone: it is plain decoding's. Under the rejection rule it also depends on the method,
        but not on the batch (unless lookup or Auto choose shapes for the whole batch).
        Raises InputError for anything out of bounds, before the first pass; later only where the model computes numbers
        that are not finite.
        """
        return self._turns(Texts(prompts, max_new_tokens, stop_token, seed, self.models[0].config))

    @torch.inference_mode()
    def _turns(self, texts: Texts) -> Iterator[Turn]:
        """The loop: one prefill a window, then turn after turn."""
        while max(texts.wanted):
            contexts, starts, seeds = texts.begin_window(with_ended=self.use_graphs)
            decoder, n_cached = self._decoder(contexts, max(map(len, contexts)) + max(texts.wanted))
            handed, schedule = decoder.begin(contexts, starts, seeds, n_cached), self.method.schedule(texts)
            try:
                while texts.room:
                    handed = self._without_ended(texts, decoder, handed)
                    shape, copied = next(schedule)
                    # A cut would be one more graph to record. Under rejection a text would depend on its batch.
                    if not self.use_graphs and decoder.rule == COUPLED:
                        shape = shape.cut(texts.room)
                    if copied is not None:
                        copied = torch.tensor([copied[b] for b in texts.rows])[:, : len(shape.tree.parents)]
                        if (copied >= 0).all():  # nothing is to be drawn, so hand on nothing to draw from
                            handed = handed._replace(hidden=handed.hidden[:, :0], logits=handed.logits[:, :0])
                        copied = copied.to(decoder.device, non_blocking=True)
                    result = (decoder.replay if self.use_graphs else decoder.turn)(shape, handed, copied)
                    handed = result.handed
                    yield texts.emit(shape, result.for_host.tolist(), result, len(self.models))  # the host sync
            except InputError:  # as for numbers that are not finite: the cache may hold what came of them
                decoder.cache.length.zero_()
                raise
            finally:
                if self.keep_cache and len(contexts) == 1:
                    (b,) = texts.rows
                    self.last = decoder, texts.texts[b][texts.start[b] :][: int(decoder.cache.length)]
                elif self.use_graphs:
                    self.idle[len(contexts)].append(decoder)

    def _decoder(self, contexts: list[list[int]], n_tokens: int) -> tuple[Decoder, int]:
        """A Decoder with room for n_tokens and turns that overshoot, and how many tokens of the context it holds.

        It is the last one if that fits, with graphs an idle one, or else a new one. Each turn reads all slots, so there
        are hardly more than needed; recorded turns have few different numbers of them, so that there is less to record.
        """
        n_slots = 1 << (n_tokens - 1).bit_length() if self.use_graphs else n_tokens
        n_slots = min(n_slots, self.models[0].config.block_size)
        shapes = self.method.largest  # a text may end one tree's depth too far while rows of other texts are written
        n_slots += max(shape.n_rows for shape in shapes) + max(shape.tree.depth[-1] for shape in shapes)
        n_slots += -n_slots % 16  # else a GPU's attention copies the mask in each layer

        def fits(decoder: Decoder) -> bool:
            return n_slots <= decoder.cache.max_len <= 2 * n_slots

        n_texts, n_cached = len(contexts), 0
        old, held = self.last if n_texts == 1 else (None, [])
        if old is not None:
            self.last = None, []  # until this text is done: no other may use it, and it may be interrupted
            same = [a == b for a, b in zip(held, contexts[0][:-1], strict=False)]
            n_cached = [*same, False].index(False)
            if fits(old):
                return old, n_cached
        fitting = sorted(filter(fits, self.idle[n_texts]), key=lambda decoder: decoder.cache.max_len)
        if fitting:
            self.idle[n_texts].remove(fitting[0])
        decoder = (fitting or [Decoder(self.models, self.sampling, self.method.rule, n_texts, n_slots)])[0]
        if old is not None:
            decoder.cache.pairs[:, :, :n_cached] = old.cache.pairs[:, :, :n_cached]
            self.idle[1] += [old] * self.use_graphs
        return decoder, n_cached

    def _without_ended(self, texts: Texts, decoder: Decoder, handed: Handed) -> Handed:
        """Ended texts stay as they are, and leave the batch once half of it has ended; a graph keeps its batch."""
        rows = texts.active_rows()
        if len(rows) != decoder.n_active:
            if not self.use_graphs and 2 * len(rows) <= len(texts.rows):
                texts.rows, handed = [texts.rows[row] for row in rows], decoder.select(rows, handed)
                rows = range(len(rows))
            decoder.set_active(rows)
        return handed

    def generate(self, prompts: Prompts, max_new_tokens: int, **settings: Any) -> Generation:
        """`stream` to its end, with the same arguments and errors: the new tokens of each prompt, and counts."""
        generation = Generation()
        for turn in self.stream(prompts, max_new_tokens, **settings):
            generation.add(turn)
        return generation
