"""Byte-level BPE: learns merges from text, or reads them from files of others; tiktoken then does the encoding.

In our own vocabularies every byte is a token, so any file can be encoded and decoded unchanged.
"""

import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from operator import add
from typing import Any

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from minipass.errors import InputError

# Text is first cut into these pieces, and no merge crosses from one into the next: a name or word with the space
# before it, up to three digits, a run of signs, or white space without the last space before a word. Together the
# alternatives take every character.
PATTERN = r" ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|im_end|>", "<|eot_id|>")  # what ends a text, or an answer in a chat
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same, but each digit is a piece of its own, and white space before a digit is one whole piece.
DIGITS_PATTERN = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
GGUF_PATTERNS = {"gpt-2": GPT2_PATTERN, "smollm": DIGITS_PATTERN}  # by tokenizer.ggml.pre
_LONG_SPACE = re.compile(r"(\s{4096})")

Pair = tuple[int, int]


def train_bpe(texts: Iterable[str], vocab_size: int) -> list[Pair]:
    """Learns merges: again and again, the most frequent pair of neighbouring tokens becomes a new token.

    Returns `vocab_size - 257` pairs of token ids, fewer if the text has no more pairs; the i-th pair becomes token
    256 + i. Ties go to the lowest ids, so the result is the same on every machine.
    Raises InputError if `vocab_size` cannot hold the 256 bytes and the end-of-text token.
    """
    if vocab_size < 257:
        raise InputError(f"the vocabulary size is {vocab_size}, but 256 bytes and end-of-text need at least 257.")
    split = regex.compile(PATTERN)
    piece_counts: Counter[str] = Counter()
    for text in tqdm(texts, desc="counting pieces", disable=None, leave=False):
        piece_counts.update(split.findall(text))
    # A character for each token: in one long piece, such as 80 KB of unbroken text, only str finds pairs fast.
    pieces = [piece.encode("utf-8", "replace").decode("latin-1") for piece in piece_counts]
    frequencies = list(piece_counts.values())

    pair_counts: Counter[str] = Counter()
    holders: defaultdict[str, set[int]] = defaultdict(set)  # for each pair, the pieces that hold it or once held it
    for index, piece in enumerate(pieces):
        for pair in map(add, piece, piece[1:]):
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
        if count != -negative_count:  # counts of old pairs only fall: put it back with its count
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        left, right = pair
        joined = token_bytes[ord(left)] + token_bytes[ord(right)]
        if joined in known:  # "a" + "aa" after "aa" + "a": to tiktoken these are one token
            continue
        new = chr(len(token_bytes))
        merges.append((ord(left), ord(right)))
        token_bytes.append(joined)
        known.add(joined)
        born: set[str] = set()
        for index in holders.pop(pair):
            parts, frequency = pieces[index].split(pair), frequencies[index]
            pieces[index] = new.join(parts)
            changes = [(right + part[0], new + part[0]) for part in parts[1:] if part]
            changes += [(part[-1] + left, part[-1] + new) for part in parts[:-1] if part]
            changes += [(right + left, new + new)] * parts[1:-1].count("")
            for gone, come in changes:
                pair_counts[gone] -= frequency
                pair_counts[come] += frequency
                holders[come].add(index)
                born.add(come)
        for fresh in born:
            heapq.heappush(heap, (-pair_counts[fresh], fresh))
        progress.update()
    progress.close()
    return merges


def build_encoding(merges: Iterable[Pair]) -> tiktoken.Encoding:
    """A tiktoken encoding: ids 0..255 are the bytes, 256 + i is the i-th merge, the last one END_OF_TEXT."""
    token_bytes = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        token_bytes.append(token_bytes[left] + token_bytes[right])
    return encoding_of(token_bytes)


def encoding_of(token_bytes: list[bytes], name: str = "minipass") -> tiktoken.Encoding:
    """The encoding whose i-th token stands for the i-th bytes, and whose last token is END_OF_TEXT."""
    return tiktoken.Encoding(
        name,
        pat_str=PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(token_bytes)},
        special_tokens={END_OF_TEXT: len(token_bytes)},
        explicit_n_vocab=len(token_bytes) + 1,
    )


def stop_tokens(encoding: tiktoken.Encoding) -> tuple[int, ...]:
    """The ids of the ENDS in this encoding. In a corpus the first one ends a document; any one ends a generated text.

    Raises InputError if there is none.
    """
    ids = tuple(encoding.encode_single_token(name) for name in ENDS if name in encoding.special_tokens_set)
    if not ids:
        raise InputError(f"the tokenizer {encoding.name} has none of the tokens {', '.join(ENDS)}, which end a text")
    return ids


def encoding_of_gguf(fields: dict[str, Any]) -> tiktoken.Encoding:
    """The encoding in the fields of a GGUF. Raises InputError if it is no BPE of bytes, or not in GGUF_PATTERNS."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in GGUF_PATTERNS:
        known = ", ".join(GGUF_PATTERNS)
        raise InputError(f"the tokenizer is {kind!r} with {pre!r}; of the kind 'gpt2' these can be read: {known}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != 1}
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return _byte_level(GGUF_PATTERNS[pre], vocabulary, special, fields["tokenizer.ggml.merges"])


def encoding_of_json(content: dict[str, Any]) -> tiktoken.Encoding:
    """The encoding in a tokenizer.json. Raises InputError if it is no BPE of bytes, or cuts text in an unknown way."""
    model, splits = content["model"], content.get("pre_tokenizer") or {}
    splits = splits.get("pretokenizers", [splits])
    shape = [split.get("type") for split in splits]
    if model.get("type") != "BPE" or shape[-1] != "ByteLevel" or content.get("normalizer") or len(shape) > 2:
        raise InputError(f"the tokenizer is {model.get('type')!r} with {shape}; only a BPE of bytes can be read")
    odd = [name for name in ("end_of_word_suffix", "continuing_subword_prefix") if model.get(name)]
    odd += [
        split for split in shape[:1] if splits[0].get("behavior", "Isolated") != "Isolated" or splits[0].get("invert")
    ]
    if odd:
        raise InputError(f"the tokenizer sets {odd[0]} in a way that cannot be read")
    if splits[-1].get("add_prefix_space"):
        raise InputError("the tokenizer puts a space before each text (add_prefix_space), which is not done here")
    if shape[0] == "Digits" and splits[0].get("individual_digits") and splits[1].get("use_regex", True):
        pattern = DIGITS_PATTERN
    elif shape[0] == "Split" and "Regex" in splits[0]["pattern"] and not splits[1].get("use_regex", True):
        pattern = splits[0]["pattern"]["Regex"]
    elif len(shape) == 1 and splits[0].get("use_regex", True):
        pattern = GPT2_PATTERN
    else:
        raise InputError(f"the tokenizer cuts text by {shape}, which cannot be read")
    special = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    return _byte_level(pattern, model["vocab"], special, model["merges"])


def _byte_level(
    pattern: str, vocabulary: dict[str, int], special: dict[str, int], merges: list[str] | list[list[str]]
) -> tiktoken.Encoding:
    """The encoding of a vocabulary that writes bytes as GPT-2's letters.

    tiktoken merges in the order of ids. Raises InputError when the merges are in another order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ids = [vocabulary["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in merges]
    if ids != sorted(ids):
        raise InputError("the tokenizer's merges are in another order than its tokens, which tiktoken cannot follow")
    ranks = {bytes(byte_of[c] for c in token): i for token, i in vocabulary.items() if token not in special}
    name = f"bpe-{hashlib.sha256(repr(sorted(ranks.items())).encode()).hexdigest()[:12]}"
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding (50257 tokens). Raises InputError if it is not on this machine and cannot be fetched."""
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


@lru_cache
def _lacking(encoding: tiktoken.Encoding) -> bytes:
    """The bytes that are no tokens, as in some vocabularies of others. Encoding drops them."""
    tokens = set(encoding.token_byte_values())
    return bytes(byte for byte in range(256) if bytes([byte]) not in tokens)


def encode_text(encoding: tiktoken.Encoding, text: str) -> np.ndarray:
    """Token ids of `text`, (N,) uint32; the name of a special token in it is plain text."""
    lacking = set(_lacking(encoding))
    if lacking and lacking & set(text.encode("utf-8", "replace")):
        return np.array(encode_bytes(encoding, text.encode("utf-8", "replace")), np.uint32)
    # tiktoken's pattern matcher runs out of stack on about a million spaces in a row: cut such runs up.
    parts = [encoding.encode_to_numpy(part, disallowed_special=()) for part in _LONG_SPACE.split(text)]
    return np.concatenate(parts)


def encode_bytes(encoding: tiktoken.Encoding, data: bytes) -> list[int]:
    """Token ids of any bytes, valid UTF-8 or not. `encoding.decode_bytes` gives `data` back, without _lacking."""
    lacking = _lacking(encoding)
    parts = re.split(b"[" + re.escape(lacking) + b"]", data) if lacking else [data]
    if len(parts) > 1:
        return [token for part in parts for token in encode_bytes(encoding, part)]
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
