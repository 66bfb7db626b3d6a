"""The trace page: well formed, self-contained, true to the turns, and safe with any text."""

import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from minipass.api import METHODS, make_method
from minipass.decode import Handed, Result
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras.trace import NOT_REACHED, REJECTED, TEXT_ENDED, Trace, number_of
from minipass.sampling import RULES, Distribution, Sampling
from minipass.texts import ACCEPTED, CORRECTED, Turn
from minipass.tokenizer import encoding_of
from minipass.trees import Drafts, DraftTree, Shape, chain

LETTERS = encoding_of([bytes([65 + i]) for i in range(10)])  # with end of text 11 tokens, as the test model has
BYTES = encoding_of([bytes([i]) for i in range(256)])
DRAWN = Sampling(temperature=1.0)
VOID = ("meta", "line", "circle", "polyline")  # the last three are closed in their own tag


class Page(HTMLParser):
    """Checks that tags balance; collects tags with attributes, and text by the class of the tags around it."""

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


def trace_of(encoding, prompt: bytes, turns) -> Trace:
    trace = Trace(encoding, prompt, {"method": "test"})
    for turn in turns:
        trace.add(turn)
    return trace


def made_turn(drafts: list[int], n_accepted: int, next_token: int, q: Distribution, p=None) -> Turn:
    """A turn of one text with a chain of drafts. q: (1, 1 + N, K); p: (1, 1 + N, V) or None."""
    result = Result(
        drafts=Drafts(torch.tensor([drafts], dtype=torch.int64), p),
        q=q,
        last=torch.tensor([n_accepted]),
        handed=Handed(torch.tensor([next_token]), torch.tensor([0]), torch.empty(1, 0, 1), torch.empty(1, 0, 1)),
        for_host=torch.tensor([[n_accepted, n_accepted, next_token, *drafts]]),
        kept=torch.arange(1 + len(drafts))[None],
    )
    return Turn(
        tokens=[[*drafts[:n_accepted], next_token]],
        origins=[[ACCEPTED] * n_accepted + [CORRECTED]],
        n_tested=[len(drafts)],
        n_accepted=[n_accepted],
        active=[True],
        shape=Shape(chain(len(drafts))),
        draft_passes=0,
        last=[n_accepted],
        result=result,
        rows=[0],
    )


def emitting(tokens: list[int]) -> Turn:
    """A turn that accepted all of `tokens` but the last, which is certain."""
    certain = torch.tensor([tokens])[..., None]
    return made_turn(
        tokens[:-1], len(tokens) - 1, tokens[-1], Distribution(certain, torch.ones(certain.shape).double())
    )


def turns_of(model, method="pass", n_new=60, *, sampling=DRAWN, prompts=(1, 2, 3), **settings) -> list[Turn]:
    settings |= {"rule": None} if method == "plain" else {}
    engine = Engine(model, make_method(method, **settings), sampling)
    return list(engine.stream(prompts, n_new))


def drafted(turns: list[Turn], trace: Trace):
    """The turns that had drafts: (turn, what the trace has of it, q and p of all tokens after each node)."""
    for turn, seen in zip(turns, trace.turns, strict=True):
        assert bool(seen.drafts) == bool(turn.shape.tree.parents)
        if seen.drafts:
            p = turn.result.drafts.p
            yield turn, seen, turn.result.q.dense(LETTERS.n_vocab)[0], None if p is None else p[0]


def accepted_nodes(turn: Turn) -> list[int]:
    """From the root to the last one."""
    way = [turn.last[0]]
    while way[0]:
        way.insert(0, turn.shape.tree.parents[way[0] - 1])
    return way


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", METHODS)
def test_the_page_is_well_formed_and_refers_to_nothing_outside(method, rule, lively_model, lively_draft):
    settings = {"draft_model": lively_draft} if method == "two-models" else {}
    turns = turns_of(lively_model, method, rule=rule, **settings)
    html = trace_of(LETTERS, b"BCD", turns).html()
    page = Page(html)
    assert not re.search(r"https?:|src=|href=|@import|url\(|//[a-z]", html)
    assert sum(tag == "details" for tag, _ in page.tags) == len(turns)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    new = [token for turn in turns for token in turn.tokens[0]]
    assert page.text() == "BCD" + LETTERS.decode(new)
    assert f"<b>{len(new) / len(turns):.2f} tokens/pass</b>" in html
    for word, used in (("the coupled rule", "coupled"), ("the rejection rule", "rejection")):
        assert (word in html) == (method != "plain" and rule == used)
    assert ("In a tree" in html) == (method == "tree")


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(1.0, top_k=3)], ids=["all tokens", "top-k"])
@pytest.mark.parametrize("method", ["pass", "two-pass"])
def test_by_the_rejection_rule_p_q_and_the_residual_are_those_of_the_turn(lively_model, method, sampling):
    turns = turns_of(lively_model, method, rule="rejection", sampling=sampling)
    trace, n_corrected = trace_of(LETTERS, b"BCD", turns), 0
    for turn, seen, q, p in drafted(turns, trace):
        for i, draft in enumerate(seen.drafts):
            assert draft.place == str(i + 1)
            assert draft.token == turn.result.drafts.tokens[0, i]
            assert draft.q == q[i, draft.token]
            assert draft.p == pytest.approx(p[i, draft.token].item())
            assert draft.accept == min(1, draft.q / draft.p)
        corrected = turn.origins[0][-1] == CORRECTED
        assert (seen.rejection is not None) == corrected
        if corrected:
            n_corrected += 1
            q, p = q[turn.n_accepted[0]], p[turn.n_accepted[0]]
            rest = (q - p).clamp(min=0)
            assert seen.rejection == pytest.approx(1 - torch.minimum(p, q).sum().item())
            assert turn.tokens[0][-1] in [token for token, *_ in seen.source]
            for token, *numbers in seen.source:
                assert numbers == pytest.approx([q[token].item(), p[token].item(), (rest / rest.sum())[token].item()])
    assert n_corrected
    cells = Page(trace.html()).cells
    for seen in trace.turns:
        for i, draft in enumerate(seen.drafts, 1):
            row = [str(i), LETTERS.decode([draft.token]), *map(number_of, (draft.p, draft.q, draft.accept))]
            assert any(cells[at : at + len(row)] == row for at in range(len(cells)))


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, Sampling(1.0, top_k=3)], ids=["greedy", "all", "top-k"])
@pytest.mark.parametrize("method", ["pass", "tree", "two-pass"])
def test_by_the_coupled_rule_a_draft_is_accepted_where_the_target_drew_it(lively_model, method, sampling):
    turns = turns_of(lively_model, method, rule="coupled", sampling=sampling)
    trace, n_accepted = trace_of(LETTERS, b"BCD", turns), 0
    for turn, seen, q, _ in drafted(turns, trace):
        emitted = turn.tokens[0]
        for draft in seen.drafts:
            depth = int(draft.place[0])
            assert draft.p is None
            reached = depth <= 1 + turn.n_accepted[0]
            assert draft.drawn == (emitted[depth - 1] if reached else None)
            assert draft.outcome == (
                NOT_REACHED if not reached else ACCEPTED if draft.token == draft.drawn else REJECTED
            )
            n_accepted += draft.outcome == ACCEPTED
            if reached:
                assert draft.q == q[accepted_nodes(turn)[depth - 1], draft.token]
    assert n_accepted == sum(turn.n_accepted[0] for turn in turns) > 0


@pytest.mark.parametrize("method", METHODS[:-2])
def test_the_last_token_of_a_turn_is_shown_with_the_probabilities_that_it_was_drawn_by(lively_model, method):
    turns = turns_of(lively_model, method, rule="coupled")
    for turn, seen in zip(turns, trace_of(LETTERS, b"BCD", turns).turns, strict=True):
        q = turn.result.q.dense(LETTERS.n_vocab)[0, turn.last[0]]
        assert turn.tokens[0][-1] in [token for token, _ in seen.source]
        assert [probability for _, probability in seen.source] == q[[token for token, _ in seen.source]].tolist()
        assert {token for token, _ in seen.source} >= set(q.topk(5).indices.tolist())


def test_of_a_tree_siblings_are_shown_with_what_those_before_left_of_p_and_q(lively_model):
    tree = DraftTree((0, 0, 1, 1, 2))
    turns = turns_of(lively_model, "tree", 120, tree=tree, rule="rejection")
    trace, n_later, n_residuals = trace_of(LETTERS, b"BCD", turns), 0, 0
    for turn, seen, q, p in drafted(turns, trace):
        tree, expected = turn.shape.tree, []  # shorter at first and at the end
        for node in accepted_nodes(turn):
            q_left, p_left = q[node], p[node]
            for child in [i for i, parent in enumerate(tree.parents, 1) if parent == node]:
                token = turn.result.drafts.tokens[0, child - 1].item()
                p_left = p_left / p_left.sum()
                place = f"{tree.depth[child]}.{tree.rank[child - 1] + 1}"
                accepted = child in accepted_nodes(turn)
                expected.append(
                    (place, token, pytest.approx(p_left[token].item()), pytest.approx(q_left[token].item()))
                )
                expected[-1] += (ACCEPTED if accepted else REJECTED,)
                if accepted:
                    break
                n_later += tree.rank[child - 1]
                q_left = (q_left - p_left).clamp(min=0)
                q_left = q_left / q_left.sum()
                p_left = p_left.clone()
                p_left[token] = 0
        if tree.width > 1 and TEXT_ENDED not in [draft.outcome for draft in seen.drafts]:
            assert [(d.place, d.token, d.p, d.q, d.outcome) for d in seen.drafts] == expected
        if seen.rejection is not None:
            n_residuals += 1
            assert [row[3] for row in seen.source] == pytest.approx([q_left[row[0]].item() for row in seen.source])
    assert n_later and n_residuals


def test_outcomes_count_what_was_accepted_and_rejected(lively_model):
    turns = turns_of(lively_model, n_new=120)
    cells = Page(trace_of(LETTERS, b"BCD", turns).html()).cells
    assert cells.count("accepted") == sum(turn.n_accepted[0] for turn in turns)
    assert cells.count("rejected") == sum(turn.origins[0][-1] == CORRECTED for turn in turns) > 0
    assert cells.count("drawn") == len(turns)


def test_drafts_after_a_stop_token_are_said_to_come_after_the_text():
    turn = emitting([1, 2, 3])
    ended = replace(turn, tokens=[[1]], origins=[[ACCEPTED]], n_tested=[1], n_accepted=[1])
    (seen,) = trace_of(LETTERS, b"", [ended]).turns
    assert [draft.outcome for draft in seen.drafts] == [ACCEPTED, TEXT_ENDED]
    assert not seen.source


def test_each_pass_is_named_for_what_its_rows_do(lively_model, lively_draft):
    def words(method, n_turns, **settings):
        page = Page(trace_of(LETTERS, b"", turns_of(lively_model, method, **settings)[:n_turns]).html())
        return [text.partition(" Emitted")[0] for _, text in page.texts if text.startswith(("A draft pass over",
                "A verify pass over", "A fused pass over", "A plain pass over"))]  # fmt: skip

    assert words("plain", 1) == ["A plain pass over the root."]
    assert words("two-pass", 2) == [
        "A draft pass over the root + 2 look-ahead rows.",
        "A verify pass over the root + 2 drafts.",
    ]
    assert words("pass", 2, lookahead=1) == [
        "A draft pass over the root + 1 look-ahead row.",
        "A fused pass over the root + 1 draft + 2 look-ahead rows.",
    ]
    assert words("two-models", 2, draft_model=lively_draft)[1] == (
        "A verify pass over the root + 2 drafts, after 2 passes of the draft model."
    )


def test_each_prompt_of_a_batch_has_its_own_trace(lively_model):
    turns = turns_of(lively_model, n_new=12, prompts=[[1], [2, 3, 4]])
    for index in range(2):
        trace, alone = Trace(LETTERS, b"", {}, index=index), Trace(LETTERS, b"", {})
        for turn in turns:
            trace.add(turn)
        for turn in Engine(lively_model, sampling=DRAWN).stream([[1], [2, 3, 4]][index], 12, seed=index):
            alone.add(turn)
        assert trace.result.tokens == [[token for turn in turns for token in turn.tokens[index]]]
        assert [seen.tokens for seen in trace.turns] == [seen.tokens for seen in alone.turns]
        assert sum(len(seen.tokens) for seen in trace.turns) == 12


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
    for prompt, turns, known in ((text, [], shown), (b"x", [emitting(tokens)], "x" + shown)):
        html = trace_of(BYTES, prompt, turns).html()
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


def test_a_thousand_turns_are_quick_and_small():
    generator = torch.Generator().manual_seed(0)
    n_drafts, n_vocab = 4, BYTES.n_vocab
    turns = []
    for _ in range(1000):
        p, q = torch.rand(2, 1, n_drafts + 1, n_vocab, generator=generator).double().softmax(-1)
        drafts = torch.randint(n_vocab - 1, (n_drafts,), generator=generator).tolist()
        turns.append(made_turn(drafts, 2, 65, Distribution(torch.arange(n_vocab).expand(q.shape), q), p))
    began = time.process_time()
    html = trace_of(BYTES, b"x", turns).html()
    assert time.process_time() - began < 5
    assert len(html.encode()) < 2_000_000
    Page(html)


def test_a_page_without_turns_can_be_written(tmp_path):
    Trace(LETTERS, b"BCD", {}).write(tmp_path / "new" / "trace.html")
    assert Page((tmp_path / "new" / "trace.html").read_text(encoding="utf-8")).text() == "BCD"


def test_a_page_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        Trace(LETTERS, b"BCD", {}).write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "rule", "words"),
    [
        ("pass", "coupled", "Drafts, each accepted if the target drew it"),
        ("pass", "rejection", "Drafts, each accepted with probability min(1, q/p)"),
        ("tree", "coupled", "Drafts on the way, each accepted if the target drew it"),
        ("tree", "rejection", "Drafts on the way, each accepted with probability min(1, q/p), of the p and q that "
         "those before it left"),
    ],
)  # fmt: skip
def test_a_table_of_drafts_says_how_they_were_tested(lively_model, method, rule, words):
    page = Page(trace_of(LETTERS, b"BCD", turns_of(lively_model, method, rule=rule)).html())
    assert words in [text for _, text in page.texts]


def test_the_page_says_that_its_tokens_can_be_selected_and_each_belongs_to_a_turn(lively_model):
    turns = turns_of(lively_model)
    page = Page(trace_of(LETTERS, b"BCD", turns).html())
    assert any("Select a token" in text and "arrow keys" in text for _, text in page.texts)
    parts = [attributes["data-t"] for _, attributes in page.tags if "data-t" in attributes]
    details = [attributes["id"] for tag, attributes in page.tags if tag == "details"]
    assert [f"t{number}" for number in parts] == details == [f"t{i}" for i in range(1, 1 + len(turns))]


BROWSER = """
// As much of a browser as the page's script needs: a text of three turns, and a list of them.
const classes = () => ({ has: new Set(), toggle(name, on) { on ? this.has.add(name) : this.has.delete(name); } });
let focused = null;
const heard = {};
const element = more => ({ classList: classes(), closest: () => null, setAttribute() {}, removeAttribute() {},
  before() {}, replaceChildren(...children) { this.children = children; },
  addEventListener(kind, hear) { heard[kind] = hear; }, blur() { focused = null; }, ...more });
const list = [1, 2, 3].map(n => element({ n, open: false, cloneNode() { return element({ n }); },
  firstElementChild: { focus() { focused = "summary " + n; } } }));
const parts = [1, 2, 3].map(n => { const part = element({ dataset: { t: String(n) } });
  part.closest = () => part;
  part.focus = () => { focused = n; heard.focusin({ target: part }); };
  return part; });
const text = element({ querySelectorAll: () => parts });
const ids = { now: element(), hint: element({ hidden: true }), turns: element(), t1: list[0], t2: list[1],
  t3: list[2] };
globalThis.document = { getElementById: id => ids[id], querySelector: () => text, querySelectorAll: () => list,
  createElement: () => element() };
const script = require("fs").readFileSync(0, "utf8");
new Function(script)();
const said = [];
function look() {
  said.push({ focused, shown: ids.now.children.map(each => each.n), open: list.map(each => each.open),
    tab: parts.map(each => each.tabIndex), later: parts.map(each => each.classList.has.has("later")) });
}
look();
for (const key of process.argv.slice(1)) {
  if (key == "Tab") parts.find(each => each.tabIndex == 0).focus();
  else text.onkeydown({ key, target: parts[focused - 1], preventDefault() {} });
  look();
}
console.log(JSON.stringify([ids.hint.hidden, said]));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="this machine has no node to run the page's script")
def test_keys_step_through_the_turns_with_the_text_up_to_there():
    html = trace_of(BYTES, b"x", [emitting([120])] * 3).html()
    script = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    keys = ["Tab", "ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "Home", "ArrowUp", "End", "Escape"]
    command = ["node", "-e", BROWSER, *keys]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=True, timeout=60)
    hidden, (whole, *seen, after_escape) = json.loads(done.stdout)
    assert not hidden
    for state in (whole, after_escape):
        assert (state["focused"], state["shown"], state["later"]) == (None, [], [False] * 3)
    expected = [1, 2, 3, 3, 2, 1, 1, 3]
    assert [state["focused"] for state in seen] == expected
    assert [state["shown"] for state in seen] == [[number] for number in expected]
    assert [state["later"] for state in seen] == [[i > number for i in (1, 2, 3)] for number in expected]
    assert [state["tab"].index(0) for state in (whole, *seen)] == [0, *(number - 1 for number in expected)]
    assert all(sorted(state["tab"]) == [-1, -1, 0] for state in (whole, *seen))
    done = subprocess.run(["node", "-e", BROWSER, "Tab", "End", "Enter"], input=script, capture_output=True, text=True,
                          check=True, timeout=60)  # fmt: skip
    state = json.loads(done.stdout)[1][-1]
    assert (state["focused"], state["open"]) == ("summary 3", [False, False, True])
