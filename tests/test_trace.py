"""The trace page: well formed, self-contained, true to the records, and safe with any text."""

import re
import time
from html.parser import HTMLParser

import pytest
import torch

from minipass.errors import InputError
from minipass.extras.trace import SeenDraft, Trace, number_of
from minipass.generate import ACCEPTED, CORRECTED, METHODS, RULES, Round, stream
from minipass.layout import DraftTree
from minipass.tokenizer import encoding_of

LETTERS = encoding_of([bytes([65 + i]) for i in range(10)])  # with end of text 11 tokens, as the test model has
BYTES = encoding_of([bytes([i]) for i in range(256)])
VOID = ("meta", "line", "circle", "polyline")  # the last three are closed in their own tag


class Page(HTMLParser):
    """Checks that tags balance; collects tags with attributes, and text by the class of the tag it stands in."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.texts, self.cells = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert tag in VOID or self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((tuple(attrs.get("class") for _, attrs in self.open), data))
        if any(tag == "td" for tag, _ in self.open):
            self.cells.append(data)

    def text(self) -> str:
        """What the large text shows."""
        return "".join(data for classes, data in self.texts if "text" in classes)


def trace_of(encoding, prompt: bytes, records) -> Trace:
    trace = Trace(encoding, prompt, {"method": "test"})
    for record in records:
        trace.add(record)
    return trace


def emitting(tokens: list[int]) -> Round:
    """A round that kept all of `tokens` but the last, without the distributions."""
    origins = [ACCEPTED] * (len(tokens) - 1) + [CORRECTED]
    return Round([tokens], [origins], [len(tokens)], [len(tokens) - 1], [True], passes=((0, 1),))


def records_of(model, method="pass", n_new=30, **settings) -> list[Round]:
    settings = {"temperature": 1.0, "generator": torch.Generator().manual_seed(0), **settings}
    return list(stream(model, [1, 2, 3], n_new, method=method, **settings))


@pytest.mark.parametrize("method", METHODS)
def test_page_is_well_formed_and_refers_to_nothing_outside(method, model, draft_model):
    records = records_of(model, method, draft_model=draft_model)
    html = trace_of(LETTERS, b"BCD", records).html()
    page = Page(html)
    assert not re.search(r"https?:|src=|href=|@import|url\(|//[a-z]", html)
    assert sum(tag == "details" for tag, _ in page.tags) == len(records)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    new = [token for record in records for token in record.tokens[0]]
    assert page.text() == "BCD" + LETTERS.decode(new)
    assert (
        f"<b>{len(new) / sum(which == 0 for record in records for which, _ in record.passes):.2f} tokens/pass</b>"
        in html
    )


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 3}])
def test_numbers_are_those_of_the_records(model, settings):
    records = records_of(model, **settings)
    trace = trace_of(LETTERS, b"BCD", records)
    for record, seen in zip(records, trace.rounds, strict=True):
        if record.drafts is None:
            assert not seen.drafts
            continue
        for i, draft in enumerate(seen.drafts):
            token = record.drafts[0, i].item()
            p, q = record.draft_probs[0, i, token].item(), record.target_probs[0, i, token].item()
            assert draft == SeenDraft(str(i + 1), token, p, q)
            assert draft.accept == min(1, q / p)
        corrected = record.origins[0][-1] == CORRECTED
        assert bool(seen.residual) == corrected
        if corrected:
            q, p = (probs[0, record.n_accepted[0]] for probs in (record.target_probs, record.draft_probs))
            rest = (q - p).clamp(min=0)
            assert seen.rejection == pytest.approx(1 - torch.minimum(p, q).sum().item())
            assert record.tokens[0][-1] in [token for token, *_ in seen.residual]
            for token, *numbers in seen.residual:
                assert numbers == pytest.approx([q[token].item(), p[token].item(), (rest / rest.sum())[token].item()])
    cells = Page(trace.html()).cells
    for seen in trace.rounds:
        for i, draft in enumerate(seen.drafts, 1):
            row = [str(i), LETTERS.decode([draft.token]), *map(number_of, (draft.p, draft.q, draft.accept))]
            assert any(cells[at : at + len(row)] == row for at in range(len(cells)))


@pytest.mark.parametrize("rule", RULES)
def test_of_a_tree_the_drafts_at_the_nodes_of_the_kept_path_are_shown(model, rule):
    tree = DraftTree((0, 0, 1, 1, 2))
    records = records_of(model, "pass-tree", tree=tree, rule=rule)
    trace, place = trace_of(LETTERS, b"BCD", records), ["1.1", "1.2", "2.1", "2.2", "2.1"]
    for record, seen in zip(records, trace.rounds, strict=True):
        if record.kept is None:
            assert not seen.drafts
            continue
        kept = record.kept[0].tolist()
        shown = [node for node in range(1, len(kept)) if kept[record.tree.parents[node - 1]]]
        assert [draft.token for draft in seen.drafts] == [record.drafts[0, node - 1].item() for node in shown]
        assert [draft.place for draft in seen.drafts] == [place[node - 1] for node in shown]
        assert seen.path == [place[node - 1] for node in shown if kept[node]]
        for draft, node in zip(seen.drafts, shown, strict=True):
            parent = record.tree.parents[node - 1]
            assert draft.q == record.target_probs[0, parent, draft.token].item()
            assert draft.p == record.draft_probs[0, record.tree.depth[node] - 1, draft.token].item()
    cells = Page(trace.html()).cells
    n_kept = sum(len(seen.path or []) for seen in trace.rounds)
    assert 0 < n_kept == cells.count("kept")
    assert cells.count("left") == sum(len(seen.drafts) for seen in trace.rounds) - n_kept


def test_outcomes_count_what_was_kept_and_rejected(model):
    records = records_of(model)
    cells = Page(trace_of(LETTERS, b"BCD", records).html()).cells
    assert cells.count("kept") == sum(record.n_accepted[0] for record in records)
    assert cells.count("rejected") == cells.count("drawn") == sum(r.origins[0][-1] == CORRECTED for r in records)


def test_each_prompt_of_a_batch_has_its_own_trace(model):
    records = list(stream(model, [[1], [2, 3, 4]], 12, lookahead=3))
    for index in range(2):
        trace = Trace(LETTERS, b"", {}, index=index)
        for record in records:
            trace.add(record)
        assert trace.result.tokens == [[token for record in records for token in record.tokens[index]]]
        assert sum(len(seen.tokens) for seen in trace.rounds) == 12


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"</script><script>alert(1)</script>", "</script><script>alert(1)</script>"),
        (b"</pre><!-- & &amp; \"' ]]>", "</pre><!-- & &amp; \"' ]]>"),
        ("👩‍💻 naïve 東京".encode(), "👩‍💻 naïve 東京"),
        (b"a\xf0\x9f\x98", r"a\xf0\x9f\x98"),
        (b"\x98\x80b\xff", r"\x98\x80b\xff"),
        (b"\x00\x1b[31m\r\x7f", r"\x00\x1b[31m\r\x7f"),
        ("\u202eabc\u2028".encode(), r"\u202eabc\u2028"),
        (b"\n\n\tx  ", "\n\n\tx  "),
    ],
)
def test_any_text_is_shown_and_nothing_of_it_is_markup(text, shown):
    calm = trace_of(BYTES, b"x", [emitting([120] * len(text))]).html()
    tokens = list(text)
    for prompt, records, known in ((text, [], shown), (b"x", [emitting(tokens)], "x" + shown)):
        html = trace_of(BYTES, prompt, records).html()
        page = Page(html)
        assert page.text() == known
        assert html.count("<script") == calm.count("<script") == 1
    assert "�" not in html


def test_a_character_over_two_tokens_is_whole_in_the_text_and_bytes_in_the_tables():
    face = list("😀".encode())
    html = trace_of(BYTES, b"", [emitting(face[:2]), emitting(face[2:])]).html()
    page = Page(html)
    assert page.text() == "😀"
    assert all(f"<code>\\x{byte:02x}</code>" in html for byte in face)
    in_prompt = Page(trace_of(BYTES, bytes(face[:3]), [emitting(face[3:])]).html())
    assert in_prompt.text() == "😀"


def test_white_space_is_visible_in_the_tables():
    html = trace_of(BYTES, b"", [emitting(list(b" \n\t"))]).html()
    assert all(f"<code>{mark}</code>" in html for mark in "␣⏎⇥")


def test_a_thousand_rounds_are_quick_and_small():
    generator = torch.Generator().manual_seed(0)
    n_drafts, n_vocab = 4, BYTES.n_vocab
    records = []
    for _ in range(1000):
        p = torch.rand(1, n_drafts, n_vocab, generator=generator).softmax(-1)
        q = torch.rand(1, n_drafts + 1, n_vocab, generator=generator).softmax(-1)
        drafts = torch.randint(n_vocab - 1, (1, n_drafts), generator=generator)
        tokens = [*drafts[0, :2].tolist(), 65]
        origins = [ACCEPTED, ACCEPTED, CORRECTED]
        records.append(Round([tokens], [origins], [4], [2], [True], ((0, 1),), drafts, p, q))
    began = time.perf_counter()
    html = trace_of(BYTES, b"x", records).html()
    assert time.perf_counter() - began < 2
    assert len(html.encode()) < 2_000_000
    Page(html)


def test_a_page_without_rounds_can_be_written(tmp_path):
    Trace(LETTERS, b"BCD", {}).write(tmp_path / "new" / "trace.html")
    assert Page((tmp_path / "new" / "trace.html").read_text(encoding="utf-8")).text() == "BCD"


def test_a_page_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        Trace(LETTERS, b"BCD", {}).write(tmp_path)
    assert list(tmp_path.iterdir()) == []
