"""Byte-level BPE: learn merges from text, then let tiktoken do the encoding.

Every byte is a token, so any file can be encoded and comes back unchanged.
"""

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from minipass.errors import InputError

# Text is cut into these pieces first, and no merge crosses from one piece into the next: a name or word with
# the space before it, up to three digits, a run of signs, or white space (but where a word follows, the last
# space of it goes with the word). Together the alternatives take every character there is.
PATTERN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
_LONG_SPACE = re.compile(r"(\s{4096})")

Pair = tuple[int, int]


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[Pair]:
    """Learn merges: again and again, the most frequent pair of neighbouring tokens becomes a new token.

    Returns `vocab_size - 257` pairs of token ids, fewer if the text runs out of pairs; the i-th pair makes
    token 256 + i. Ties go to the lowest ids, so the result is the same on every machine.
    Raises InputError if `vocab_size` cannot hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise InputError(f"the vocabulary size is {vocab_size}, but 256 bytes and end-of-text need at least 257.")
    split = regex.compile(PATTERN)
    piece_counts: Counter[str] = Counter()
    for text in tqdm(texts, desc="counting pieces", disable=None, leave=False):
        piece_counts.update(split.findall(text))
    pieces = [list(piece.encode("utf-8", "replace")) for piece in piece_counts]
    frequencies = list(piece_counts.values())

    pair_counts: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # the pieces that hold a pair, or once held it
    for index, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += frequencies[index]
            holders[pair].add(index)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    merges: list[Pair] = []
    token_bytes = [bytes([byte]) for byte in range(256)]
    known = set(token_bytes)
    progress = tqdm(total=vocab_size - 257, desc="merging pairs", disable=None, leave=False)
    while heap and len(merges) < vocab_size - 257:
        negative_count, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative_count:  # counts of old pairs only ever fall, so put it back where it belongs
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        joined = token_bytes[pair[0]] + token_bytes[pair[1]]
        if joined in known:  # "a" + "aa" after "aa" + "a": tiktoken knows tokens by their bytes, so one is enough
            continue
        new_id = 256 + len(merges)
        merges.append(pair)
        token_bytes.append(joined)
        known.add(joined)
        born: set[Pair] = set()
        for index in holders.pop(pair):
            old, frequency = pieces[index], frequencies[index]
            new = _merge(old, pair, new_id)
            for gone in pairwise(old):
                pair_counts[gone] -= frequency
            for kept in pairwise(new):
                pair_counts[kept] += frequency
                if new_id in kept:
                    holders[kept].add(index)
                    born.add(kept)
            pieces[index] = new
        for fresh in born:
            heapq.heappush(heap, (-pair_counts[fresh], fresh))
        progress.update()
    progress.close()
    return merges


def _merge(piece: list[int], pair: Pair, new_id: int) -> list[int]:
    """The piece with each occurrence of `pair`, from left to right, replaced by `new_id`."""
    merged: list[int] = []
    position = 0
    while position < len(piece):
        if piece[position] == pair[0] and piece[position + 1 : position + 2] == [pair[1]]:
            merged.append(new_id)
            position += 2
        else:
            merged.append(piece[position])
            position += 1
    return merged


def build_encoding(merges: Iterable[Pair], name: str = "minipass") -> tiktoken.Encoding:
    """A tiktoken encoding: ids 0..255 are the bytes, 256 + i is the i-th merge, the last one END_OF_TEXT."""
    token_bytes = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        token_bytes.append(token_bytes[left] + token_bytes[right])
    return encoding_of(token_bytes, name)


def encoding_of(token_bytes: list[bytes], name: str = "minipass") -> tiktoken.Encoding:
    """The encoding whose i-th token stands for the i-th bytes, and whose last token is END_OF_TEXT."""
    return tiktoken.Encoding(
        name,
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(token_bytes)},
        special_tokens={END_OF_TEXT: len(token_bytes)},
        explicit_n_vocab=len(token_bytes) + 1,
    )


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding (50257 tokens). Raises InputError if it is not on this machine nor to be fetched."""
    try:
        return tiktoken.get_encoding("gpt2")
    except (
        OSError,
        ValueError,
    ) as error:  # requests' errors are OSErrors; a mangled download is a ValueError
        raise InputError(
            f"the gpt2 vocabulary could not be loaded ({type(error).__name__}): it needs the network once, "
            "or TIKTOKEN_CACHE_DIR must name a folder that already holds it."
        ) from error


def encode_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of `text`, uint32 (N,); the name of a special token in it is text like any other."""
    # tiktoken's pattern matcher runs out of stack on about a million spaces in a row, so cut such runs up.
    parts = [encoding.encode_to_numpy(part, disallowed_special=()) for part in _LONG_SPACE.split(text)]
    return np.concatenate(parts)


def encode_bytes(encoding: tiktoken.Encoding, data: bytes) -> list[int]:
    """Token ids of any bytes, valid UTF-8 or not; `encoding.decode_bytes` gives exactly `data` back."""
    ids: list[int] = []
    # surrogateescape turns each invalid byte into one character that no valid UTF-8 holds: U+DC80 to U+DCFF.
    parts = re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape"))
    for index, part in enumerate(parts):
        if index % 2:
            invalid = part.encode("utf-8", "surrogateescape")
            ids += [encoding.encode_single_token(bytes([byte])) for byte in invalid]
        else:
            ids += encode_text(encoding, part).tolist()
    return ids
