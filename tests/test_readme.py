"""README and docs say what is so: their figures, quotes, counts and links."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import minipass

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
CORE, MOST_OFF = ROOT / "minipass", 3  # code lines that a count may be off


def cells(header: str) -> list[list[str]]:
    """The rows of the table of README with this header."""
    table = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


def code_lines(source: str) -> int:
    """Lines without blank ones, comments and docstrings."""
    said = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in said:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imported(name: str) -> set[str]:
    """A module of the package with all that it imports from there, as files."""
    found, new = set(), {name}
    while new:
        name = new.pop()
        found.add(name)
        source = (CORE / name).read_text("utf-8")
        of_package = re.findall(r"^from minipass import ([\w, ]+)", source, re.M)
        names = [each for line in of_package for each in line.split(", ")]
        names += re.findall(r"^from minipass\.(\w+) import", source, re.M)
        new |= {f"{each}.py" for each in names} - found
    return found


def named(figures: object, *names: str) -> Iterator[tuple[str, dict]]:
    """The rows of an experiment's figures that tell of a method, each behind its text, decoding and method."""
    if isinstance(figures, list):
        for each in figures:
            yield from named(each, *names)
    elif isinstance(figures, dict) and {"method", "speedup"} <= figures.keys():
        own = [figures[name] for name in ("text", "decoding", "method") if name in figures]
        yield ", ".join([*names, *own]), figures
    elif isinstance(figures, dict):
        for key, value in figures.items():
            yield from named(value, *names, key)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


def test_the_result_table_is_what_was_measured():
    experiments = json.loads((ROOT / "figures/bench/results.json").read_text())["experiments"]
    table = cells("| experiment |")
    assert len(table) == 5
    for experiment, text, method, *printed in table:
        (row,) = [row for name, row in named(experiments[experiment]) if name.endswith(f"{text}, {method}")]
        figures = [row["tokens_per_pass"], sorted(row["speedup"])[1]]  # the speed-up is between its quartiles
        assert printed == [f"{figure:.2f}" for figure in figures], f"of {experiment}, {text}, {method}"


def test_each_speed_up_in_the_text_is_in_the_table():
    for number in re.findall(r"(\d\.\d+) times", README):
        assert number in [row[4] for row in cells("| experiment |")]


def test_the_core_is_what_decoding_imports_and_its_lines_are_counted():
    table = {re.search(r"minipass/(\w+\.py)", name)[1]: int(lines) for name, lines, _ in cells("| file | lines |")}
    assert table.keys() == imported("engine.py")
    counted = {name: code_lines((CORE / name).read_text("utf-8")) for name in table}
    off = {name: counted[name] for name in table if abs(table[name] - counted[name]) > MOST_OFF}
    assert not off, f"counted, unlike the table: {off}"
    assert f"in {sum(table.values()):,} lines of Python" in README, f"the table sums up to {sum(table.values())}"


def test_quoted_lines_are_lines_of_the_turn():
    turn = [line.split("  #")[0].strip() for line in (CORE / "decode.py").read_text("utf-8").splitlines()]
    for _, quoted in cells("| the paper's Algorithm 1 |"):
        assert quoted.strip("`") in turn


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```|`[^`]*`", "", page.read_text("utf-8"), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
        file, _, heading = "".join(link).partition("#")
        if not re.match("https?:", file):
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), file
            headings = re.findall(r"^#+ (.*)", target.read_text("utf-8"), re.M) if heading else []
            anchors = [re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings]
            assert not heading or heading in anchors, "".join(link)


def test_readme_and_docs_link_to_each_other():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README
        assert "(../README.md)" in page.read_text("utf-8")


def worked_turn(method: minipass.TwoPass | minipass.Fused, number: int):
    """The turn with this number of what sample.py writes by default: its tokens, result and encoding."""
    from sample import DEFAULT_PROMPT  # beside the package

    loaded = minipass.load("joint")
    engine = minipass.Engine(loaded.model, method, minipass.Sampling(0.8, top_k=10))
    turns = engine.stream(loaded.encoding.encode(DEFAULT_PROMPT), 80, seed=0)
    return [next(turns) for _ in range(number)][-1], loaded.encoding


@pytest.mark.parametrize(
    "method, number, accepted, drawn, quoted",
    [
        (minipass.Fused(2), 23, "items", ".", {" =": 0.174, ".": 0.650, "[": 0.155}),
        (minipass.TwoPass(2), 4, " =", " list", {" []": 0.519, " list": 0.212, " [": 0.082, " {}": 0.030}),
    ],
)
def test_the_worked_rounds_are_real(monkeypatch, method, number, accepted, drawn, quoted):
    monkeypatch.syspath_prepend(ROOT)
    turn, encoding = worked_turn(method, number)
    assert [encoding.decode([token]) for token in turn.tokens[0]] == [accepted, drawn]
    q = dict(zip(turn.result.q.tokens[0, 1].tolist(), turn.result.q.probs[0, 1].tolist(), strict=True))
    page = (ROOT / "docs/idea.md").read_text("utf-8")
    for token, probability in quoted.items():
        assert q[encoding.encode_single_token(token)] == pytest.approx(probability, abs=0.0006)
        assert re.search(rf"^\| `{re.escape(token)}` \|.*{probability:.3f}", page, re.M)
