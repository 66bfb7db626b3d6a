"""Corpora, the split and the windows: what is read, what is held out, and what is refused."""

import os

import numpy as np
import pytest
import torch

from minipass import data
from minipass.data import (
    Document,
    encode_documents,
    even_windows,
    read_documents,
    sample_windows,
    split_documents,
)
from minipass.errors import InputError
from minipass.tokenizer import build_encoding, train_bpe

ENCODING = build_encoding(train_bpe(["some words to learn some merges from, some more words"], 280))


def write(folder, files: dict[str, str | bytes]):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture
def python(tmp_path, monkeypatch):
    """A make-believe interpreter: its standard library holds site-packages, as real ones do."""
    write(
        tmp_path / "lib",
        {
            "zebra.py": "stripes = 1\n",
            "ant/__init__.py": "",
            "ant/hill.py": "grains = 2\n",
            "ant/readme.txt": "not python",
            "ant/__pycache__/hill.py": "cached = 3\n",
            ".hidden/secret.py": "hidden = 4\n",
            "latin.py": "name = 'é'\n".encode("latin-1"),
            "nul.py": "a = '\0'\n",
            "site-packages/pip.py": "installed = 5\n",
            "site-packages/vendored/zebra.py": "stripes = 1\n",
            "dist-packages/apt.py": "distributed = 6\n",
        },
    )
    lib, site = tmp_path / "lib", tmp_path / "lib/site-packages"
    folders = {"stdlib": str(lib), "purelib": str(site), "platlib": str(lib / "ant/../site-packages")}
    monkeypatch.setattr(data.sysconfig, "get_path", folders.__getitem__)
    return lib


def test_python_is_the_standard_library_without_installed_packages(python):
    assert read_documents("python") == [
        Document("ant/hill.py", "grains = 2\n"),
        Document("zebra.py", "stripes = 1\n"),
    ]


def test_installed_adds_each_package_once_and_leaves_out_copies(python):
    assert [document.path for document in read_documents("installed")] == [
        "ant/hill.py",
        "zebra.py",
        "site-packages/pip.py",
    ]


def test_docstrings_are_the_docstrings_and_nothing_else(python):
    long = "A sentence that is long enough to be worth learning from."
    write(
        python,
        {
            "a.py": f'"""{long} One."""\nx = "{long} Not a docstring."\n'
            f'class C:\n    """{long} Two.\n\n    Indented.\n    """\n'
            f'    async def f(self):\n        """{long} Three \\ud800\\0."""\n'
            f'        # {long} A comment.\ndef short():\n    """Too short."""\n',
            "broken.py": f'"""{long}"""\ndef (:\n',
            "escapes.py": f'"""{long} \\d"""\nassert (1, "always true")\n',
            "deep.py": "x = " + "(" * 5000 + ")" * 5000,
        },
    )
    assert read_documents("docstrings") == [
        Document("a.py", f"{long} One.\n\n{long} Two.\n\nIndented.\n\n{long} Three ."),
        Document("escapes.py", f"{long} \\d"),
    ]


@pytest.mark.parametrize("source", data.BUILT_IN)
def test_an_interpreter_without_source_is_refused(tmp_path, monkeypatch, source):
    monkeypatch.setattr(data.sysconfig, "get_path", lambda kind: str(tmp_path / "gone"))
    with pytest.raises(InputError, match=f'"{source}" is empty'):
        read_documents(source)


def test_the_real_standard_library_is_found():
    documents = read_documents("python")
    paths = [document.path for document in documents]
    assert paths == sorted(set(paths)) and {"ast.py", "json/decoder.py"} <= set(paths)
    assert not any("site-packages" in path or path.startswith(("/", ".")) for path in paths)
    assert len({document.text for document in documents}) == len(documents)


def test_a_folder_gives_its_text_files_in_order_with_their_exact_text(tmp_path):
    write(
        tmp_path,
        {
            "b.txt": "second\r\n",
            "a/z.md": "first ünïcode 🦆",
            "c-copy.txt": "second\r\n",
            "blank": " \n",
            "image.png": b"\x89PNG\xff\xfe",
            "nul": "a\0b",
            ".git/config": "hidden",
            ".env": "hidden too",
            "__pycache__/x": "cache",
        },
    )
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    expected = [Document("a/z.md", "first ünïcode 🦆"), Document("b.txt", "second\r\n")]
    assert read_documents(tmp_path) == read_documents(str(tmp_path)) == expected


def test_unreadable_files_are_skipped_in_a_folder_and_refused_alone(tmp_path, monkeypatch):
    write(tmp_path, {"mine": "readable", "theirs": "forbidden"})
    read_bytes = data.Path.read_bytes

    def guarded(path):
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(data.Path, "read_bytes", guarded)  # the one who runs the tests may be root
    assert read_documents(tmp_path) == [Document("mine", "readable")]
    with pytest.raises(InputError, match="theirs.*Permission denied"):
        read_documents(tmp_path / "theirs")


def test_one_file_gives_one_document(tmp_path):
    write(tmp_path, {"poem.txt": "line\n"})
    assert read_documents(str(tmp_path / "poem.txt")) == [Document("poem.txt", "line\n")]


def test_a_path_object_is_never_the_name_of_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"python": "a file of that name"}))
    assert read_documents(data.Path("python")) == [Document("python", "a file of that name")]
    assert read_documents("./python") == [Document("python", "a file of that name")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no file or folder"),
        ("x" * 5000, "no file or folder"),
        ("nul\0byte", "no file or folder"),
        ("binary", "not plain text"),
        ("with-nul", "not plain text"),
        ("empty", "empty or blank"),
        ("blank", "empty or blank"),
        ("folder", "0 UTF-8 text files"),
    ],
)
def test_a_source_without_text_is_refused_in_one_sentence(tmp_path, name, message):
    files = {"binary": b"\xff\xfe\xfd", "with-nul": "a\0", "empty": "", "blank": " \n", "folder/.x": "hidden"}
    write(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        read_documents(f"{tmp_path}/{name}")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(InputError, match="no file or folder"):
        read_documents("")


def test_the_split_is_the_same_on_every_machine():
    heldout = ["chunk.py", "email/contentmanager.py", "opcode.py", "sched.py", "secrets.py"]
    train = ["ast.py", "heapq.py", "json/decoder.py", "os.py", "random.py", "test/test_ast.py", "this.py"]
    documents = [Document(path, "text of " + path) for path in sorted(heldout + train)]
    parts = split_documents(documents)
    assert [[document.path for document in part] for part in parts] == [train, heldout]


def test_the_split_parts_are_disjoint_complete_and_about_a_twentieth_is_held_out():
    documents = [Document(f"folder/{i}.txt", str(i)) for i in range(4000)]
    train, heldout = split_documents(documents)
    assert 150 < len(heldout) < 250
    assert sorted(train + heldout, key=lambda d: int(d.text)) == documents
    more, _ = split_documents(documents + [Document("later.txt", "added")])
    assert set(train) <= set(more), "a new document must not move others"


def test_neither_part_of_a_split_is_ever_empty():
    train, heldout = split_documents([Document("os.py", "a"), Document("heapq.py", "b"), Document("ast.py", "c")])
    assert [document.path for document in train] == ["os.py", "ast.py"]
    assert [document.path for document in heldout] == ["heapq.py"], "the smallest hash"
    train, heldout = split_documents([Document("chunk.py", "a"), Document("sched.py", "b")])
    assert [document.path for document in train] == ["sched.py"], "both hashes say held out"
    assert [document.path for document in heldout] == ["chunk.py"]


@pytest.mark.parametrize(
    ("text", "heldout"),
    [
        ("line\n" * 100, "line\n" * 5),
        ("x" * 96 + "\nend", "end"),
        ("x" * 100, "x" * 5),
        ("\n" + "x" * 99, "x" * 5),
        ("x" * 99 + "\n", "xxxx\n"),
        ("ab", "b"),
    ],
)
def test_a_lone_document_is_cut_at_a_line_near_its_end(text, heldout):
    (first,), (last,) = split_documents([Document("only.txt", text)])
    assert first.text + last.text == text
    assert first.path == last.path == "only.txt"
    assert last.text == heldout


def test_too_little_to_split_is_refused():
    with pytest.raises(InputError, match="0 documents"):
        split_documents([])
    with pytest.raises(InputError, match="1 characters"):
        split_documents([Document("tiny", "x")])


def test_each_document_ends_with_end_of_text():
    texts = ["some words", "<|endoftext|> spelled out", "more\n"]
    tokens = encode_documents([Document(str(i), text) for i, text in enumerate(texts)], ENCODING)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    ends = np.flatnonzero(tokens == ENCODING.eot_token)
    assert len(ends) == 3 and ends[-1] == len(tokens) - 1
    starts = [0, *(ends[:-1] + 1)]
    assert [ENCODING.decode(tokens[s:e].tolist()) for s, e in zip(starts, ends, strict=True)] == texts


def test_no_documents_are_no_tokens_and_large_ids_get_a_larger_type():
    assert encode_documents([], ENCODING).shape == (0,)

    class Wide:
        n_vocab, special_tokens_set = 2**16 + 1, {"<|endoftext|>"}

        def encode_single_token(self, name):
            return 2**16

        def token_byte_values(self):
            return [bytes([byte]) for byte in range(256)]

        def encode_to_numpy(self, text, disallowed_special):
            return np.zeros(len(text), np.uint32)

    tokens = encode_documents([Document("a", "xyz")], Wide())
    assert tokens.dtype == np.uint32 and tokens.tolist() == [0, 0, 0, 2**16]


def test_a_corpus_is_encoded_into_a_file_a_few_documents_at_a_time(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(7):
        (tmp_path / f"in/{i}.txt").write_text(f"text {i}\n" * (i + 1))
    documents = data.find_documents(tmp_path / "in")
    at_once, real = [], data.encode_documents

    def encode(some, encoding):
        at_once.append(len(some))
        return real(some, encoding)

    monkeypatch.setattr(data, "DOCUMENTS_AT_ONCE", 3)
    monkeypatch.setattr(data, "encode_documents", encode)
    data.encode_to_file(documents, ENCODING, tmp_path / "out/tokens")
    tokens = data.open_tokens(tmp_path / "out/tokens", ENCODING)
    assert at_once == [3, 3, 1]
    assert isinstance(tokens, np.memmap)
    assert np.array_equal(tokens, real(read_documents(tmp_path / "in"), ENCODING))
    assert sample_windows(tokens, 2, 5, np.random.default_rng(0)).shape == (2, 5)


def test_a_document_of_a_folder_is_read_when_it_is_needed_and_missed_when_it_is_gone(tmp_path):
    (tmp_path / "a.txt").write_text("first")
    (document,) = data.find_documents(tmp_path)
    (tmp_path / "a.txt").write_text("second")
    assert document.text == "second"
    (tmp_path / "a.txt").unlink()
    with pytest.raises(InputError, match=r"a\.txt\" changed while it was in use"):
        encode_documents([document], ENCODING)


def test_sampled_windows_are_stretches_of_the_tokens_and_reach_both_ends():
    tokens = np.arange(100, 120, dtype=np.uint16)
    windows = sample_windows(tokens, 500, 8, np.random.default_rng(0))
    assert windows.shape == (500, 8) and windows.dtype == torch.int64
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert windows.min() == 100 and windows.max() == 119
    assert len(windows[:, 0].unique()) == 13


def test_sampled_windows_follow_the_generator():
    tokens = np.arange(1000, dtype=np.uint16)
    first, again, other = (sample_windows(tokens, 16, 10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [7, 8, 20, 21, 23, 99, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 50])
def test_even_windows_do_not_overlap_and_span_the_tokens(size, count):
    windows = even_windows(np.arange(size, dtype=np.uint16), count, 7)
    assert windows.shape == (min(count, size // 7), 7) and windows.dtype == torch.int64
    starts = windows[:, 0]
    assert torch.equal(windows, starts[:, None] + torch.arange(7))
    gaps = starts.diff()
    assert starts[0] == 0 and (gaps >= 7).all()
    if len(gaps):
        assert windows[-1, -1] == size - 1 and gaps.max() - gaps.min() <= 1


def test_windows_longer_than_the_text_are_refused_with_both_numbers():
    tokens = np.arange(9, dtype=np.uint16)
    assert sample_windows(tokens, 2, 9, np.random.default_rng(0)).tolist() == [list(range(9))] * 2
    with pytest.raises(InputError, match="9 tokens.* 10"):
        sample_windows(tokens, 2, 10, np.random.default_rng(0))
    with pytest.raises(InputError, match="9 tokens.* 10"):
        even_windows(tokens, 1, 10)
