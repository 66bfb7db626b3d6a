"""The course: what a handout holds, how it grades blank, half done and done, and that graders catch wrong solutions."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from minipass.errors import InputError
from minipass.extras import course
from minipass.extras.course import test_exercises as graders
from minipass.extras.course.grading import EXERCISES, placeholder
from minipass.layout import lookahead_ids, tree, with_groups
from minipass.losses import lookahead_loss, rows_after_cuts
from minipass.model import KVCache
from minipass.rounds import draft_pass, fused_round, two_pass, verify_pass
from minipass.sampling import probabilities, speculative_accept

ROOT = Path(__file__).parents[1]


def graders_of(number: int) -> list:
    """The grader functions of one exercise."""
    marked = [(function, getattr(function, "pytestmark", ())) for function in vars(graders).values()]
    return [function for function, marks in marked if any(mark.name == f"exercise_{number}" for mark in marks)]


def points(grader) -> int:
    return grader.pytestmark[0].args[0]


# The handout.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A handout just written."""
    path = tmp_path_factory.mktemp("course") / "new" / "handout"
    course.write_handout(path)
    return path


def test_a_handout_is_the_package_but_for_the_bodies_of_the_exercises(folder):
    extras = ROOT / "minipass" / "extras"
    for path in [file for place in (extras.parent, extras, extras / "benchmark") for file in place.glob("*.py")]:
        real, given = path.read_text("utf-8"), (folder / path.relative_to(ROOT)).read_text("utf-8")
        expected = course.functions(ast.parse(real))
        gaps = {name: n for n, exercise in EXERCISES.items() for file, name in exercise.functions if file == path.name}
        assert set(gaps) <= set(expected)
        for name, node in course.functions(ast.parse(given)).items():
            if name in gaps:
                assert ast.unparse(node.body[1]) == placeholder(gaps[name], name).replace('"', "'")
                assert len(node.body) == 2
                node.body[1:] = expected[name].body[1:]
            assert ast.unparse(node) == ast.unparse(expected[name])
        pieces = re.split(r"^ +raise NotImplementedError\(\"Exercise .*\n", given, flags=re.M)
        assert len(pieces) == 1 + len(gaps)
        assert real.startswith(pieces[0]) and real.endswith(pieces[-1]), "character by character"
        assert all(piece in real for piece in pieces)


def test_a_handout_holds_graders_and_sheet_but_no_solution_and_no_model(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"ASSIGNMENT.md", "pyproject.toml", "tests/conftest.py", "tests/test_exercises.py", "bench.py"} <= files
    assert not [name for name in files if name.endswith(".pt") or name.startswith("minipass/extras/course")]


def test_the_sheet_agrees_with_the_exercises_and_their_graders():
    sheet = (course.COURSE / "ASSIGNMENT.md").read_text("utf-8")
    for number, exercise in EXERCISES.items():
        (section,) = re.findall(rf"^## Exercise {number}: {exercise.title}\n(.*?)(?=^## )", sheet, re.M | re.S)
        assert all(f"`{name}`" in section and f"`{file}`" in section for file, name in exercise.functions)
        assert f"**Grade** ({exercise.points} points): `python -m pytest -m exercise_{number}`" in section
        needs = re.search(r"\*\*Needs\*\* (.*?)\. \*\*Grade", section)[1]
        assert [int(digit) for digit in re.findall(r"\d", needs)] == list(exercise.needs)
        assert exercise.points == sum(map(points, graders_of(number)))
        assert all(grader.__name__.startswith("test_") for grader in graders_of(number))
    assert sum(map(int, re.findall(r"(\d+) points", sheet))) == 100


def test_the_projects_own_tests_know_the_markers_of_a_handout(folder):
    for place in (ROOT, folder):
        markers = re.findall(r'^    "exercise_(\d): (.*)",$', (place / "pyproject.toml").read_text("utf-8"), re.M)
        assert markers == [(str(number), exercise.title) for number, exercise in EXERCISES.items()]


def test_a_folder_that_is_in_use_or_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError):
            course.write_handout(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    run = subprocess.run(
        [sys.executable, "-m", "minipass.extras.course", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("minipass.extras.course: ")
    (tmp_path / "file").unlink()
    course.write_handout(tmp_path)  # an empty folder will do


# Grading: as generated, half done, done.


def grade(folder: Path, *arguments: str) -> tuple[dict[str, str], str]:
    """Runs pytest in a handout, as a student does: each grader's name with "passed" or what it said, and the output."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        said = [f"{part.tag}: {part.get('message')}" for part in case if part.tag in ("failure", "error", "skipped")]
        results[case.get("name")] = said[0] if said else "passed"
    return results, run.stdout


def fill_in(folder: Path, but: tuple[int, ...]) -> None:
    """Puts the real bodies back, but for some exercises'."""
    for name, text in course.handout(but).items():
        (folder / name).write_text(text, "utf-8")


def test_a_handout_grades_blank_half_done_and_done(folder):
    results, out = grade(folder)
    assert len(results) == sum(len(graders_of(number)) for number in EXERCISES)
    for number, exercise in EXERCISES.items():
        expected = "skipped: needs exercise" if exercise.needs else f"failure: NotImplementedError: Exercise {number}: "
        for grader in graders_of(number):
            assert results[grader.__name__].startswith(expected)
        assert f"0 of {exercise.points} points" in out
    assert "needs exercise 2, 4" in out

    fill_in(folder, but=(6, 7, 8))
    results, out = grade(folder, "-m", "exercise_6 or exercise_7 or exercise_8")
    for number in (6, 7, 8):
        for grader in graders_of(number):
            assert results.pop(grader.__name__).startswith(f"failure: NotImplementedError: Exercise {number}: ")
        assert f"0 of {EXERCISES[number].points} points" in out
    assert not results

    fill_in(folder, but=())
    results, out = grade(folder)
    assert set(results.values()) == {"passed"}
    assert all(f"{exercise.points} of {exercise.points} points" in out for exercise in EXERCISES.values())


def test_one_exercise_is_graded_alone_and_says_what_to_look_at(tmp_path):
    course.write_handout(tmp_path)
    fill_in(tmp_path, but=(1, 6))
    path = tmp_path / "minipass" / "sampling.py"
    wrong = "residual = (q - p).clamp(min=0)"
    path.write_text(path.read_text("utf-8").replace(wrong, "residual = q"), "utf-8")
    results, out = grade(tmp_path, "-m", "exercise_5")
    assert set(results) == {grader.__name__ for grader in graders_of(5)}
    assert "of 12 points\n" in out
    assert "-3: after a rejection: draw from normalize(max(0, q - p)), not from q" in out
    assert "Exercise 1" not in out


# Wrong solutions: each is the real code with one change.

MISTAKES = {
    "no residual": (5, speculative_accept, "(q - p).clamp(min=0)", "q"),
    "bonus forgotten": (
        5, speculative_accept, "target_probs[batch, n_accepted]",
        "target_probs[batch, n_accepted.clamp(max=n_drafts - 1)]",
    ),
    "off-by-one position": (2, tree, "visible.sum(-1) - 1", "visible.sum(-1)"),
    "stale cache": (3, KVCache.mask, "(0, 1), value=False", "(0, 1), value=True"),
    "greedy only": (
        5, speculative_accept, "u * p_of_draft < q_of_draft", "q_of_draft == target_probs[:, :n_drafts].amax(2)",
    ),
    "greedy at any temperature": (1, probabilities, "logits / temperature", "logits / 1e-9"),
    "top-k by threshold": (
        1, probabilities, "torch.full_like(logits, -math.inf).scatter_(-1, tokens, values)",
        "logits.masked_fill(logits < values[..., -1:], -math.inf)",
    ),
    "keeps drafts behind a rejection": (5, speculative_accept, "kept.long().cumprod(1)", "kept.long()"),
    "parents not inherited": (2, tree, "visible[batch, parents[:, row]]", "visible[batch, parents[:, row]] & False"),
    "cache of the first text for all": (3, KVCache.mask, "self.length[:, None]", "self.length[:1, None]"),
    "values not stored": (3, KVCache.store, "values[self.batch, :, slots] = v.transpose(1, 2)", "pass"),
    "groups see each other": (
        4, with_groups, "rows[:, first_row[lengths > 0]] = anchors[:, lengths > 0]",
        "rows[:, first_row[:1]] = anchors[:, :1]",
    ),
    "ids from vocab_size + 1": (4, lookahead_ids, "vocab_size + torch", "vocab_size + 1 + torch"),
    "look-ahead row kept": (6, draft_pass, "decoder.keep(1)", "decoder.keep(2)"),
    "drafts greedy, p not": (6, verify_pass, "drafts = decoder.draw(draft_probs)", "drafts = draft_probs.argmax(-1)"),
    "free token not verified": (6, verify_pass, "[free[:, None], drafts]", "[drafts, drafts[:, :1]]"),
    "free token forgotten": (6, two_pass, "run.emit(free=free, verified=verified)", "run.emit(verified=verified)"),
    "next draft pass behind the free token": (6, two_pass, "(verified.next_token)", "(free)"),
    "targets of the rows behind": (7, fused_round, "logits[:, :n_rows]", "logits[:, 1 : 1 + n_rows]"),
    "always the first group": (7, fused_round, "[verified.last]", "[verified.last * 0]"),
    "cut itself": (8, rows_after_cuts, "[..., None] + 1 +", "[..., None] +"),
    "KL the wrong way": (8, lookahead_loss, "(log_q.exp() * (log_q - log_p))", "(log_p.exp() * (log_p - log_q))"),
    "target not detached": (8, lookahead_loss, "text_logits.detach()", "text_logits"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_solution_fails_its_exercise_and_none_that_does_not_need_it(mistake, monkeypatch):
    number, function, right, wrong = MISTAKES[mistake]
    source = textwrap.dedent(inspect.getsource(function))
    assert right in source, f"{function.__name__} changed: plant this mistake anew"
    scope = dict(function.__globals__)
    exec(source.replace(right, wrong), scope)
    monkeypatch.setattr(function, "__code__", scope[function.__name__].__code__)  # wherever it was imported to
    lost = {}
    for other, exercise in EXERCISES.items():
        if other == number or (other < 6 and number not in exercise.needs):
            for grader in graders_of(other):
                try:
                    grader()
                except (AssertionError, RuntimeError, IndexError, ValueError) as error:
                    lost.setdefault(other, []).append(error)
    assert set(lost) == {number}
    assert any(isinstance(error, AssertionError) for error in lost[number]), "a message that helps"
