"""The page that trace.py fills in: frame, style, script, and the explanations of turns, rules and trees.

Nothing here depends on a text. PAGE has a $name for each part that does.
"""

from string import Template

TITLE = "<title>PaSS, turn by turn</title>"
PAGE = Template(
    """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
"""
    + TITLE
    + """
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d4d4d4; --box: #f6f6f6;
  --accepted: #00654a; --bonus: #00558a; --corrected: #9c3d00; --tint: 12%; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e8e8e8; --soft: #a6a6a6; --line: #3c4046;
  --box: #1e2125; --accepted: #4fd0a5; --bonus: #7cc4f0; --corrected: #f0a35c; --tint: 16%; } }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 1.8rem 0 .5rem; } .lead { margin: .2rem 0 0; }
pre, code, .chip, .legend span { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre, code, .chip, dd { overflow-wrap: anywhere; white-space: break-spaces; unicode-bidi: isolate; }
.text { background: var(--box); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; margin: 0;
  font-size: .875rem; line-height: 1.9; tab-size: 4; }
.sampled, .accepted, .corrected, .bonus { text-decoration: underline 2px; text-underline-offset: .4em;
  text-decoration-skip-ink: none; border-radius: 2px; }
.prompt { color: var(--soft); }
#hint, #now { font-size: .875rem; } #hint { color: var(--soft); margin: 0 0 .6rem; } #now { margin-top: .6rem; }
[data-t] { cursor: pointer; border-radius: 2px; } [data-t]:focus-visible, .chosen { outline: 2px solid var(--bonus); }
.later { opacity: .2; }
.sampled { text-decoration: underline 2px dotted var(--soft); }
.accepted { color: var(--accepted); text-decoration-style: solid;
  background: color-mix(in srgb, var(--accepted) var(--tint), transparent); }
.bonus { color: var(--bonus); text-decoration-style: double; text-decoration-thickness: 1px;
  background: color-mix(in srgb, var(--bonus) var(--tint), transparent); }
.corrected { color: var(--corrected); text-decoration-style: wavy; text-decoration-thickness: 1px;
  background: color-mix(in srgb, var(--corrected) var(--tint), transparent); }
.legend { list-style: none; padding: 0; margin: 0 0 .6rem; font-size: .875rem; color: var(--soft);
  display: flex; flex-wrap: wrap; gap: .1rem 1.4rem; }
figure { margin: 0; max-width: 30rem; } figcaption, small, caption { color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 9px; fill: var(--soft); }
polyline { fill: none; stroke: var(--bonus); stroke-width: 1.5; } circle { fill: var(--bonus); }
.grid { stroke: var(--line); stroke-width: .7; } .plain { stroke: var(--soft); stroke-dasharray: 4 3; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .6rem 1rem; margin: 0; }
dt { color: var(--soft); font-size: .8125rem; } dd { margin: 0; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); } details:last-child { border-bottom: 1px solid var(--line); }
summary { padding: .3rem .2rem; cursor: pointer; line-height: 1.9; }
summary b { min-width: 2.4em; padding-right: .4em; }
summary:focus-visible { outline: 2px solid var(--bonus); outline-offset: -2px; } summary small { white-space: nowrap; }
.chip { font-size: .8125rem; padding: .05rem .2rem; margin-right: .3rem; }
details p { margin: .2rem 0 .5rem; } details > :not(summary) { margin-left: 1.1rem; font-size: .875rem; }
table { border-collapse: collapse; margin-bottom: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .2rem; } th { font-weight: 600; }
th, td { text-align: right; padding: .15rem .45rem; border-top: 1px solid var(--line); }
.words, td:has(code), td:last-child { text-align: left; }
.unused { color: var(--soft); }
button { font: inherit; font-size: .875rem; margin: 0 0 .6rem; }
@media (max-width: 30rem) { th, td { padding: .15rem .2rem; font-size: .8125rem; }
  details > :not(summary) { margin-left: 0; } }
</style></head>
<body><main>
<h1>PaSS, turn by turn</h1>
<p class="lead">$headline</p>
<h2>Text</h2><ul class="legend">$legend</ul>
<p id="hint" hidden>Select a token to see its turn and the text up to there. Then the arrow keys step from turn to
turn, Home and End go to the first and the last, Enter goes to the turn in the list below, and Escape shows all.</p>
<pre class="text" dir="auto">$text</pre>
<div id="now"></div>
<h2>Tokens per pass</h2>$curve
<h2>Figures</h2><dl>$figures</dl>
<h2>Turns</h2>$explanation<div id="turns">$turns</div>
</main>
<script>
// The page says everything without this. A turn's tokens in the text are its button, and arrow keys go through them.
const byId = id => document.getElementById(id), details = document.querySelectorAll("details");
const text = document.querySelector(".text"), parts = [...text.querySelectorAll("[data-t]")], now = byId("now");
const turnOf = part => byId("t" + part.dataset.t), partAt = event => event.target.closest("[data-t]");
function choose(part) { // none: the whole text
  const chosen = parts.indexOf(part), turn = part && turnOf(part).cloneNode(true);
  parts.forEach((each, i) => {
    each.tabIndex = i == Math.max(chosen, 0) ? 0 : -1;
    each.classList.toggle("chosen", i == chosen);
    each.classList.toggle("later", chosen >= 0 && i > chosen);
  });
  now.replaceChildren(...turn ? [turn] : []);
  if (turn) { turn.open = true; turn.removeAttribute("id"); }
}
text.addEventListener("focusin", event => choose(partAt(event)));
text.onclick = event => { if (!partAt(event)) choose(); };
text.onkeydown = event => {
  const part = partAt(event), at = parts.indexOf(part), last = parts.length - 1;
  const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last };
  if (!part || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in to) parts[Math.min(Math.max(to[event.key], 0), last)].focus();
  else if (event.key == "Enter" || event.key == " ") {
    turnOf(part).open = true;
    turnOf(part).firstElementChild.focus();
  } else if (event.key == "Escape") { part.blur(); choose(); }
  else return;
  event.preventDefault();
};
parts.forEach(part => part.setAttribute("role", "button"));
choose();
const button = document.createElement("button");
byId("hint").hidden = button.hidden = !parts.length;
button.textContent = "Open or close all";
button.onclick = () => { const open = !details[0].open; details.forEach(each => { each.open = open; }); };
byId("turns").before(button);
</script></body></html>
"""
)

EXPLANATION = """A turn is one pass of the target model. A draft pass looks ahead: its look-ahead rows give the draft
distributions for the next turn. A verify pass tests drafts: q is a draft's probability in the target distribution,
given the drafts before it. A fused pass does both. Drafts are accepted up to the first that is rejected; those after it
do not count. The last token of a turn is drawn by the target: a table shows the likeliest tokens of the distribution
that it was drawn from."""
COUPLED_EXPLANATION = """Here drafts were tested by the coupled rule: at each place the target draws a token, with the
noise of that place in the text, and a draft is accepted if it is the same token. Drafts are drawn with the same noise,
so this is likely. The text is the one that plain decoding draws. (At temperature 0 draft and target are the likeliest
tokens.)"""
REJECTION_EXPLANATION = """Here drafts were tested by the rejection rule: p is the probability of a draft in the draft
distribution, and it is accepted with probability min(1, q/p). After a rejection the token is drawn from the residual,
max(0, q - p) made to sum to 1."""
TREE_EXPLANATION = """In a tree one place has several drafts: 1.1, 1.2 and so on. After an accepted draft, the drafts
that hang from it are tested."""
TREE_REJECTION_EXPLANATION = """Drafts for one place are tested one after the other. A rejected draft leaves the
residual as q, and as p what is left without that draft, both made to sum to 1; the next test uses these."""

# Above a table of drafts, "each accepted ..".
COUPLED_TEST = "if the target drew it"
REJECTION_TEST = "with probability min(1, q/p)"
TREE_REJECTION_TEST = f"{REJECTION_TEST}, of the p and q that those before it left"
