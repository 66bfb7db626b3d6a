"""The animation: well-formed, the same text in both panels, and each turn's tokens when the run had them."""

import re
import sys
from itertools import groupby
from xml.etree import ElementTree

import pytest
from conftest import random_lively_model

from minipass.decode import Fused, Plain
from minipass.engine import Engine
from minipass.errors import InputError
from minipass.extras import animation
from minipass.extras.animation import COLUMNS, cells, measure, svg
from minipass.sampling import Sampling
from minipass.tokenizer import encoding_of

PIECES = [b"a", b"b ", b"<&", b"\n\n  ", "é".encode()[:1], "é".encode()[1:], b"\x00", b"long" * 5, b"\t", b" ]]>"]
ENCODING = encoding_of(PIECES)  # with end of text 11 tokens, as the test model has
NEW = 24


@pytest.fixture(scope="module")
def runs():
    model = random_lively_model(seed=2)
    methods = {"plain": Plain(), "fused": Fused(2)}
    engines = {name: Engine(model, method, Sampling(1.0)) for name, method in methods.items()}
    return measure(engines, [1, 2], NEW, seed=3)


def panels(picture: str) -> list[list[tuple[str, str, str]]]:
    """For each panel its tokens: (origin, text, animation)."""
    root = ElementTree.fromstring(picture)
    found = [group for group in root.findall(".//{*}g") if group.get("class") == "panel"]
    return [
        [(each.get("class").split()[1], "".join(each.itertext()), each.get("style").removeprefix("animation-name:"))
            for each in panel if "token" in each.get("style", "")]
        for panel in found
    ]  # fmt: skip


def test_both_panels_hold_the_same_text_and_the_origins_of_their_run(runs):
    plain, fused = panels(svg(runs, ENCODING, [1, 2], "a note"))
    assert [text for _, text, _ in plain] == [text for _, text, _ in fused]
    for run, panel in zip(runs, (plain, fused), strict=True):
        assert [origin for origin, _, _ in panel] == [origin for turn in run.turns for origin in turn.origins[0]]
    assert len({origin for origin, _, _ in fused}) == 4  # this run has all of them


def test_a_turns_tokens_come_together_at_its_time_slowed_down_by_the_factor_that_is_stated(runs):
    picture = svg(runs, ENCODING, [1, 2], "a note")
    slower = int(re.search(r"shown (\d+) times slower", picture)[1])
    loop = float(re.search(r"animation: ([\d.]+)s", picture)[1])
    begins = {name: float(percent) / 100 * loop for name, percent in re.findall(
        r"@keyframes (token\S+?)\{(?:0%\{opacity:0\})?([\d.]+)%\{opacity:1\}\}", picture)}  # fmt: skip
    for run, panel in zip(runs, panels(picture), strict=True):
        turns = [(name, len(list(group))) for name, group in groupby(name for _, _, name in panel)]
        assert [n for _, n in turns] == [len(turn.tokens[0]) for turn in run.turns]
        times = [begins[name] for name, _ in turns]
        assert times == pytest.approx([slower * seconds for seconds in run.seconds], abs=1e-3)
        assert run.seconds == sorted(set(run.seconds)) and run.seconds[0] == 0


def test_each_picture_is_small_and_needs_nothing_from_outside(runs):
    picture = svg(runs, ENCODING, [1, 2], "a note")
    assert len(picture) < 100_000
    assert picture.count("http") == 1  # the name of SVG
    assert not re.search(r"<script|<image|@import|url\(", picture)


def test_cells_hold_every_character_once_and_none_past_the_last_column():
    text = "ab\n" + "x" * (2 * COLUMNS) + "\n" + "y" * (COLUMNS + 1)
    placed, n_rows = cells([text[:5], text[5:70], text[70:]])
    parts = [part for piece in placed for part in piece]
    assert "".join(chars for _, _, chars in parts).replace("\n", "") == text.replace("\n", "")
    assert all(column + len(chars.rstrip("\n")) <= COLUMNS for _, column, chars in parts)
    assert n_rows == 5 and parts[-1] == (4, 0, "y")


def test_texts_that_differ_are_not_shown():
    engines = {"one": Engine(random_lively_model(seed=2)), "other": Engine(random_lively_model(seed=3))}
    with pytest.raises(InputError, match="differ"):
        measure(engines, [1, 2], NEW)


@pytest.mark.parametrize("file", [".", "/"])
def test_a_place_that_is_no_file_is_one_sentence(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["animation", file])
    with pytest.raises(InputError, match="FILE must name a file"):
        animation.main()


def test_the_command_writes_the_shipped_models_text(tmp_path, monkeypatch, capsys):
    file = tmp_path / "a.svg"
    monkeypatch.setattr(animation, "REPEATS", 1)
    words = ["animation", str(file), "--prompt", "def f(\udcff", "--max-new-tokens", "8", "--dtype", "float64"]
    monkeypatch.setattr(sys, "argv", words)
    animation.main()
    plain, fused = panels(file.read_text(encoding="utf-8"))
    assert len(plain) == len(fused) == 8
    assert panels((tmp_path / "a-narrow.svg").read_text(encoding="utf-8")) == [plain, fused]
    assert "7 tokens" in capsys.readouterr().out
