"""Corpora that are already on this machine, the split into training and held-out text, and token windows."""

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

from minipass.errors import InputError
from minipass.files import atomic_write
from minipass.tokenizer import encode_text, stop_tokens

BUILT_IN = ("python", "installed", "docstrings")
HELDOUT_FRACTION = 0.05
DOCUMENTS_AT_ONCE = 32  # in memory while a corpus is encoded into a file
SHORTEST_DOCSTRING = 40  # characters; shorter ones are mostly "Return the name."


@dataclass(frozen=True)
class Document:
    """One text, and its path relative to the corpus, with forward slashes."""

    path: str
    text: str


@dataclass(frozen=True)
class FileDocument:
    """A Document on disk: its text is read each time that it is used."""

    path: str
    file: Path

    @property
    def text(self) -> str:
        """Raises InputError when the file is gone or is no longer text."""
        try:
            return self.file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'the file "{self.file}" changed while it was in use: {error}') from error


def read_documents(source: str | Path) -> list[Document]:
    """What find_documents finds, in memory."""
    return [Document(document.path, document.text) for document in find_documents(source)]


def find_documents(source: str | Path) -> list[Document | FileDocument]:
    """The documents of a corpus, sorted by path, without files that are blank, not UTF-8, or copies of earlier ones.

    `source` is "python" (the standard library's .py files), "installed" (those and the installed packages'),
    "docstrings" (the standard library's docstrings, one document a file), or the path of a file or folder. A folder may
    be larger than memory: its files are read one at a time, and again when their text is used. A `Path` is always a
    path. Raises InputError if there is no such path or no text in it.
    """
    if isinstance(source, str) and source in BUILT_IN:
        documents = list(_drop_copies(_read_python(with_site_packages=source == "installed")))
        if source == "docstrings":
            documents = list(_drop_copies(Document(doc.path, _docstrings(doc.text)) for doc in documents))
        if not documents:
            raise InputError(f'"{source}" is empty, as this Python came without its source: name a folder.')
        return documents
    path = Path(source)
    if os.path.isdir(source):  # False where Path.is_dir raises: a path that is too long or forbidden
        documents = list(_drop_copies(_read_folder(path)))
        if not documents:
            raise InputError(f'the folder "{path}" holds 0 UTF-8 text files, but at least 1 is needed.')
        return documents
    if os.path.exists(source) and not os.path.isfile(source):
        raise InputError(f'"{source}" is a device or pipe, but a corpus is read more than once: give a file or folder.')
    if not os.path.isfile(source):
        names = ", ".join(f'"{name}"' for name in BUILT_IN)
        raise InputError(f'there is no file or folder "{source}": give the path of one, or one of {names}.')
    try:
        text = _as_text(path.read_bytes())
    except OSError as error:
        raise InputError(f'the file "{path}" cannot be read ({error.strerror}), but it must be.') from error
    if text is None:
        raise InputError(f'the file "{path}" is not plain text: it must be UTF-8 without NUL characters.')
    if not text.strip():
        raise InputError(f'the file "{path}" is empty or blank, but some text is needed.')
    return [Document(path.name, text)]


def _as_text(data: bytes) -> str | None:
    """The text of a UTF-8 file, or None for anything else."""
    try:
        return None if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _read_folder(folder: Path, suffix: str = "", skip: Sequence[str] = ()) -> Iterator[FileDocument]:
    """The readable text files below a folder, sorted by relative path, without hidden ones and caches."""
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "." and name not in ("__pycache__", *skip)]
        names = [name for name in files if name[0] != "." and name.endswith(suffix)]
        found += [(Path(parent) / name).relative_to(folder).as_posix() for name in names]
    for relative in sorted(found):
        path = folder / relative
        try:
            text = _as_text(path.read_bytes()) if path.is_file() else None  # reading a pipe might never end
        except OSError:
            continue  # such as a file that belongs to someone else
        if text is not None:
            yield FileDocument(relative, path)


def _read_python(with_site_packages: bool) -> Iterator[FileDocument]:
    """The .py files of the running interpreter's standard library and, if asked, of its packages."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    # Packages lie inside the standard library's folder, unless a virtual environment moves them elsewhere.
    yield from _read_folder(stdlib, ".py", skip=("site-packages", "dist-packages"))
    if with_site_packages:
        for folder in sorted({Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}):
            for document in _read_folder(folder, ".py"):
                yield FileDocument(f"site-packages/{document.path}", document.file)


def _drop_copies(documents: Iterable[Document]) -> Iterator[Document]:
    """Skips blank documents and copies: training must not see a copy of a held-out document."""
    seen: set[bytes] = set()
    for document in documents:
        text = document.text
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield document


def parsed(code: str) -> ast.Module | None:
    """The code's syntax tree; None if it is not Python, as some of the standard library's tests on purpose."""
    with warnings.catch_warnings(), suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        warnings.simplefilter("ignore")  # about invalid escapes in other people's code
        return ast.parse(code)
    return None


def _docstrings(code: str) -> str:
    """The docstrings of a module, its classes and functions, in order, blank lines between; "" if none."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(parsed(code) or ast.Module([], [])) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = [ast.get_docstring(node, clean=True) or "" for node in nodes]
    text = "\n\n".join(docstring for docstring in found if len(docstring) >= SHORTEST_DOCSTRING)
    # An escape in a docstring can spell what no UTF-8 text file holds: half a surrogate pair, or NUL.
    return text.encode("utf-8", "ignore").decode("utf-8").replace("\0", "")


def _path_hash(document: Document) -> float:
    """A number in [0, 1) that depends on the document's path alone, so it is the same on every machine."""
    digest = hashlib.sha256(document.path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def split_documents(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """Splits into (training, held-out) documents: about 5 % are held out, chosen by the hashes of their paths.

    Of a single document the last 5 % are held out. Neither part is ever empty. Raises InputError if there is too little
    to split.
    """
    if len(documents) == 1:
        return _cut(documents[0])
    if not documents:
        raise InputError("there are 0 documents, but at least 1 is needed to train on and hold some out.")
    hashes = [_path_hash(document) for document in documents]
    count = sum(value < HELDOUT_FRACTION for value in hashes)
    count = min(max(count, 1), len(documents) - 1)
    heldout = set(sorted(range(len(documents)), key=hashes.__getitem__)[:count])
    train = [document for index, document in enumerate(documents) if index not in heldout]
    return train, [documents[index] for index in sorted(heldout)]


def _cut(document: Document) -> tuple[list[Document], list[Document]]:
    """Splits one document at the first line start in its last 5 %, or where these begin if there is none."""
    path, text = document.path, document.text
    if len(text) < 2:
        raise InputError(f'"{path}" has {len(text)} characters, but at least 2 are needed to hold some out.')
    cut = max(1, min(len(text) - 1, round(len(text) * (1 - HELDOUT_FRACTION))))
    line_start = text.find("\n", cut - 1) + 1
    cut = line_start if 0 < line_start < len(text) else cut
    return [Document(path, text[:cut])], [Document(path, text[cut:])]


def _token_dtype(encoding: tiktoken.Encoding) -> type:
    return np.uint16 if encoding.n_vocab <= 2**16 else np.uint32


def encode_documents(documents: Iterable[Document], encoding: tiktoken.Encoding) -> np.ndarray:
    """The tokens of all documents, end-of-text after each: (N,) uint16, or uint32 for a vocabulary over 65,536."""
    dtype = _token_dtype(encoding)

    def encode(document: Document) -> np.ndarray:
        return np.append(encode_text(encoding, document.text), np.uint32(stop_tokens(encoding)[0])).astype(dtype)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # tiktoken releases Python's lock while it encodes
        return np.concatenate([np.empty(0, dtype), *pool.map(encode, documents)])


def encode_to_file(documents: Sequence[Document], encoding: tiktoken.Encoding, path: Path) -> None:
    """Writes what encode_documents gives into the file `path`, with only a few documents at a time in memory.

    Raises InputError if the file cannot be written.
    """

    def write(temporary: Path) -> None:
        starts = range(0, len(documents), DOCUMENTS_AT_ONCE)
        with open(temporary, "wb") as file:
            for start in tqdm(starts, desc=f"encoding {path.name}", disable=None, leave=False):
                encode_documents(documents[start : start + DOCUMENTS_AT_ONCE], encoding).tofile(file)

    atomic_write(path, write)


def save_tokens(tokens: np.ndarray, encoding: tiktoken.Encoding, path: Path) -> None:
    """Writes tokens (N,) as encode_to_file does. Raises InputError if the file cannot be written."""
    atomic_write(path, tokens.astype(_token_dtype(encoding)).tofile)


def open_tokens(path: Path, encoding: tiktoken.Encoding) -> np.ndarray:
    """The tokens in a file of encode_to_file, (N,), memory-mapped: read from the disk when they are used."""
    return np.memmap(path, _token_dtype(encoding), mode="r")


def digest_of(files: Iterable[Path]) -> str | None:
    """A hash of the content of these files; None if one is missing."""
    digest = hashlib.sha256()
    for path in files:
        if not os.path.isfile(path):
            return None
        digest.update(f"{path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            for block in iter(lambda file=file: file.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest()


def check_length(tokens: np.ndarray, length: int, name: str = "the text") -> None:
    """Raises InputError, which names them, if tokens (N,) are too few for a window of that length."""
    if len(tokens) < length:
        raise InputError(f"{name} has {len(tokens)} tokens, but one window takes {length}: give more text.")


def sample_windows(tokens: np.ndarray, batch_size: int, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Random windows of `tokens` (N,), as int64 (batch_size, length). Raises InputError if N < length."""
    check_length(tokens, length)
    starts = rng.integers(0, len(tokens) - length + 1, size=(batch_size, 1))
    return torch.from_numpy(tokens[starts + np.arange(length)].astype(np.int64))


def even_windows(tokens: np.ndarray, count: int, length: int) -> torch.Tensor:
    """Evenly spaced windows of `tokens` (N,), always the same, none overlapping, as int64 (<= count, length).

    Fewer than `count` come back where no more fit. Raises InputError if N < length.
    """
    check_length(tokens, length)
    count = min(count, len(tokens) // length)
    starts = np.arange(count)[:, None] * (len(tokens) - length) // max(count - 1, 1)
    return torch.from_numpy(tokens[starts + np.arange(length)].astype(np.int64))
