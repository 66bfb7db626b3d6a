"""The tokenizer: what goes in comes back unchanged, and merges are learned as one would by hand."""

import random
import time
from itertools import pairwise

import numpy as np
import pytest
import regex
import requests
import tiktoken

from minipass.errors import InputError
from minipass.tokenizer import (
    END_OF_TEXT,
    PATTERN,
    build_encoding,
    encode_bytes,
    encode_text,
    gpt2_encoding,
    train_bpe,
)

TEXT = "The heron waited by the water, and the water waited by the heron.\n    while heron: wait(10_000)\n" * 20

AWKWARD = {
    "nothing": b"",
    "every byte": bytes(range(256)),
    "random bytes": random.Random(0).randbytes(5000),
    "emoji and scripts": "naïve 🦆👩‍👩‍👧 日本語 हिन्दी ٣٤".encode(),
    "line ends": b"one\r\ntwo\rthree\n\n\r\n  four\t\x0b\x0c\x1c\x85",
    "a cut-off character": "🦆".encode()[:3] + b" then text",
    "encoded surrogates": b"\xed\xa0\x80 \xed\xb2\x80\xed\xb3\xbf",
    "overlong and out of range": b"\xc0\x80\xf4\x90\x80\x80\xff\xfe",
    "NUL and controls": b"\x00\x00a\x00\x01\x7f",
    "a byte order mark": b"\xef\xbb\xbfimport this",
    "end-of-text spelled out": b"before<|endoftext|>after <|endoftext|>",
    "a million spaces": b" " * 10**6 + b"x",
}


@pytest.fixture(scope="module")
def encoding() -> tiktoken.Encoding:
    return build_encoding(train_bpe([TEXT], 320))


@pytest.mark.parametrize("data", AWKWARD.values(), ids=AWKWARD.keys())
def test_any_bytes_come_back_unchanged(encoding, data):
    ids = encode_bytes(encoding, data)
    assert encoding.decode_bytes(ids) == data
    assert encoding.eot_token not in ids


def test_spelled_out_end_of_text_is_text_but_the_token_itself_is_the_last_id(encoding):
    ids = encode_text(encoding, f"a{END_OF_TEXT}b")
    assert encoding.decode(ids) == f"a{END_OF_TEXT}b" and encoding.eot_token not in ids
    assert encoding.eot_token == encoding.n_vocab - 1
    assert encoding.decode([encoding.eot_token]) == END_OF_TEXT


def test_encode_text_agrees_with_tiktoken(encoding):
    ids = encode_text(encoding, TEXT)
    assert ids.dtype == np.uint32
    assert ids.tolist() == encoding.encode_ordinary(TEXT) == encode_bytes(encoding, TEXT.encode())


def test_the_first_256_ids_are_the_bytes(encoding):
    assert [encoding.decode_single_token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]


def test_merges_follow_the_counts_worked_out_by_hand():
    # Pieces: "abc" once, " abc" twice, " ab" once. Pairs: a-b 4 times, space-a and b-c 3 times. With
    # ab merged, space-ab and ab-c have 3 each, and the space has the lower id. That leaves (space ab)-c twice
    # and ab-c once.
    a, b, c, space = b"abc "
    ab, space_ab = 256, 257
    assert train_bpe(["abc abc abc ab"], 257 + 4) == [(a, b), (space, ab), (space_ab, c), (ab, c)]


def test_ties_go_to_the_lowest_ids():
    assert train_bpe(["yz", "\n", "bc"], 258) == [(ord("b"), ord("c"))]


def test_a_run_of_one_letter_is_merged_from_the_left():
    merges = train_bpe(["aaaaa"], 258)
    assert merges == [(97, 97)]
    assert encode_text(build_encoding(merges), "aaaaa").tolist() == [256, 256, 97]


def test_no_merge_crosses_pieces():
    encoding = build_encoding(train_bpe([TEXT], 280))
    tokens = [encoding.decode([token]) for token in range(256, 279)]
    assert all(len(regex.findall(PATTERN, token)) == 1 for token in tokens)


def test_every_token_has_bytes_of_its_own():
    rng = random.Random(1)
    text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 12))) for _ in range(300))
    merges = train_bpe([text], 1000)
    encoding = build_encoding(merges)
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    assert len(set(tokens)) == len(tokens) == 256 + len(merges) + 1
    assert encoding.decode(encode_text(encoding, text)) == text


def test_incremental_counts_agree_with_counting_afresh():
    merges = train_bpe([TEXT], 300)
    pieces = [list(piece.encode()) for piece in regex.findall(PATTERN, TEXT)]
    for new_id, (left, right) in enumerate(merges, start=256):
        counts: dict[tuple[int, int], int] = {}
        for piece in pieces:
            for pair in pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        assert min(counts, key=lambda pair: (-counts[pair], pair)) == (left, right)
        for piece in pieces:
            position = 0
            while position < len(piece) - 1:
                if piece[position : position + 2] == [left, right]:
                    piece[position : position + 2] = [new_id]
                position += 1


def test_unbroken_text_is_learned_in_seconds():
    rng = random.Random(0)
    genome = "".join(rng.choice("ACGT") for _ in range(80_000))  # one piece
    began = time.process_time()
    assert len(train_bpe([genome], 757)) == 500
    assert time.process_time() - began < 8, "a second; 15 where each merge goes through the whole piece"


def test_training_is_deterministic_and_does_not_depend_on_the_order_of_texts():
    texts = TEXT.splitlines(keepends=True) + ["another line\n", "and one more\n"]
    assert train_bpe(texts, 330) == train_bpe(list(texts), 330) == train_bpe(reversed(texts), 330)


def test_merges_compress(encoding):
    assert len(encode_text(encoding, TEXT)) < len(TEXT) / 2


def test_training_stops_when_the_text_runs_out_of_pairs():
    assert train_bpe(["hi"], 5000) == [(ord("h"), ord("i"))]
    assert train_bpe([], 5000) == []
    assert build_encoding([]).n_vocab == 257


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    assert train_bpe([TEXT], 257) == []
    with pytest.raises(InputError, match="256 .*at least 257"):
        train_bpe([TEXT], 256)


def test_the_pattern_leaves_no_character_out():
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i <= 0xDFFF]
    rng = random.Random(2)
    rng.shuffle(characters)
    shuffled = "".join(characters)
    assert "".join(regex.findall(PATTERN, shuffled)) == shuffled
    assert all(map(regex.compile(PATTERN).fullmatch, characters[:20_000]))
    plain = build_encoding([])
    assert plain.decode(plain.encode_ordinary(shuffled)) == shuffled


@pytest.mark.parametrize("failure", [requests.exceptions.ConnectionError("no route"), OSError(), ValueError()])
def test_without_the_network_gpt2_is_refused_in_one_sentence(monkeypatch, failure):
    def fail(name: str):
        raise failure

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(InputError, match="network once.*TIKTOKEN_CACHE_DIR") as caught:
        gpt2_encoding()
    assert "\n" not in str(caught.value)


def test_bytes_come_back_unchanged_where_ids_are_not_byte_values():
    # GPT-2 numbers its bytes in an order of its own; any such order must do.
    order = list(range(256))
    random.Random(3).shuffle(order)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    shuffled = tiktoken.Encoding("shuffled", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256})
    data = AWKWARD["random bytes"]
    assert shuffled.decode_bytes(encode_bytes(shuffled, data)) == data
