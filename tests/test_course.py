"""The course: what a handout holds, how it grades blank, half done and done, and that graders catch wrong solutions."""

import ast
import base64
import csv
import importlib
import inspect
import io
import operator
import re
import subprocess
import sys
import textwrap
import tokenize
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from minipass import weights
from minipass.decode import Decoder, TwoPass, fused
from minipass.errors import InputError
from minipass.extras import course, figures
from minipass.extras.course.grade import graders_of, points
from minipass.extras.course.grading import EXERCISES, placeholder
from minipass.extras.course.slides import slides
from minipass.extras.course.variant import IDENTIFIERS, REORDERED, WORDS, Variant, rename
from minipass.layout import tree, with_groups
from minipass.losses import lookahead_loss, rows_after_cuts
from minipass.model import DraftHead, KVCache
from minipass.sampling import Sampling, reject, uniform
from minipass.trees import accept

ROOT = Path(__file__).parents[1]


# The handout.


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A handout just written."""
    path = tmp_path_factory.mktemp("course") / "new" / "handout"
    course.write_handout(path)
    return path


def test_a_handout_is_the_package_but_for_the_bodies_of_the_exercises(folder):
    extras = ROOT / "minipass" / "extras"
    paths = [path for place in (extras.parent, extras, extras / "benchmark") for path in place.glob("*.py")]
    for path in [path for path in paths if path.name != "course.py"]:
        real, given = path.read_text("utf-8"), (folder / path.relative_to(ROOT)).read_text("utf-8")
        expected = course.functions(ast.parse(real))
        gaps = {
            name: n
            for n, exercise in EXERCISES.items()
            for file, name in exercise.functions
            if path == extras.parent / file
        }
        assert set(gaps) <= set(expected)
        for name, node in course.functions(ast.parse(given)).items():
            if name in gaps:
                n_kept = int(ast.get_docstring(expected[name]) is not None)
                (statement,) = node.body[n_kept:]
                assert ast.unparse(statement) == placeholder(gaps[name], name).replace('"', "'")
                node.body[n_kept:] = expected[name].body[n_kept:]
            assert ast.unparse(node) == ast.unparse(expected[name])
        pieces = re.split(r"^ +raise NotImplementedError\(\"Exercise .*\n", given, flags=re.M)
        assert len(pieces) == 1 + len(gaps)
        assert real.startswith(pieces[0]) and real.endswith(pieces[-1]), "character by character"
        assert all(piece in real for piece in pieces)


def test_a_handout_holds_graders_sheet_and_a_model_but_no_solution(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"ASSIGNMENT.md", "pyproject.toml", "tests/conftest.py", "submit.py", "bench.py"} <= files
    assert not [name for name in files if "course" in name]
    loaded = weights.load(folder / "minipass" / "checkpoints" / "joint.pt")
    assert loaded.model.config.n_lookahead and loaded.model.draft_head is not None


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
    assert sum(map(int, re.findall(r"(\d+) points", sheet))) == 120
    table = re.findall(r"^\| (\d+) .*? \| ([\d +]+) \| (\d+) \|", sheet, re.M)
    assert sum(sum(map(int, points.split("+"))) for _, points, _ in table) == 120
    assert {int(number) for number, _, _ in table} == {*EXERCISES, 12}
    teacher = (course.COURSE / "TEACHER.md").read_text("utf-8")
    hours = re.findall(r"^\| (\d+) .*? \| ([^|]*\d) \|", teacher, re.M)
    assert [(n, sum(map(int, re.findall(r"\d+", h)))) for n, h in hours] == [(n, int(h)) for n, _, h in table]
    assert f"{sum(int(h) for _, _, h in table)} in all" in teacher


def test_pytest_knows_the_markers_of_a_handout(folder):
    for place in (ROOT, folder):
        markers = re.findall(r'^    "exercise_(\d+): (.*)",$', (place / "pyproject.toml").read_text("utf-8"), re.M)
        assert markers == [(str(number), exercise.title) for number, exercise in EXERCISES.items()]


def test_the_key_holds_each_solution_and_the_points_that_teachers_give(tmp_path):
    course.write_key(tmp_path / "key")
    for number, exercise in EXERCISES.items():
        for file, name in exercise.functions:
            (node,) = ast.parse((tmp_path / "key" / f"exercise_{number}" / f"{name}.py").read_text("utf-8")).body
            real = course.functions(ast.parse((course.PACKAGE / file).read_text("utf-8")))[name]
            assert list(map(ast.unparse, node.body[1:])) == list(map(ast.unparse, real.body[1:]))  # past a docstring
    teacher = (tmp_path / "key" / "TEACHER.md").read_text("utf-8")
    for number, exercise in EXERCISES.items():
        assert f"| {number} {exercise.title} |" in teacher
    assert f"{sum(exercise.points for exercise in EXERCISES.values())} of the 120 points" in teacher


def test_slides_are_one_page_with_the_pictures_of_the_masks(tmp_path):
    page = slides()
    tags = re.findall(r"<(/?)(section|h1|ul|li|p|pre|code|b)>", page)
    opened = []
    for closes, name in tags:  # well formed
        if closes:
            assert opened.pop() == name
        else:
            opened.append(name)
    assert not opened
    assert page.count("<section>") == page.count("<h1>") >= 12
    pictures = [base64.b64decode(each) for each in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == len(figures.PICTURES) and all(each.startswith(b"\x89PNG") for each in pictures)
    assert not re.search(r"https?:|`|\*\*|!\[", page), "it needs no network, and no mark is left"


# Variants.


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> Path:
    """The key of a variant."""
    path = tmp_path_factory.mktemp("variant") / "key"
    course.write_key(path, 7)
    return path


def in_variant(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "minipass.course", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)


def test_a_seed_makes_the_same_variant_again_and_another_one_another(varied, tmp_path):
    sources = [path.read_text("utf-8") for path in sorted(course.PACKAGE.glob("*.py"))]
    one, again, other = (Variant(seed, sources) for seed in (7, 7, 8))
    assert vars(one) == vars(again) and one.names != other.names
    assert set(one.parameters) == set(REORDERED)
    assert all(
        sorted(one.order[name]) == sorted(own) and one.order[name] != own for name, own in one.parameters.items()
    )


def test_new_names_are_new(varied):
    """Else two things would have one name."""
    others = [new for names in (IDENTIFIERS | WORDS).values() for new in names]
    assert len(others) == len(set(others))
    paths = [*(ROOT / name for name in course.SCRIPTS), *course.PACKAGE.rglob("*.py")]
    for path in paths:
        if path.name != "variant.py":
            names = {t.string for t in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)}
            assert not names & set(others), path


def test_the_key_of_a_variant_solves_its_handout_and_public_solutions_do_not(varied, tmp_path):
    code = varied / "course"
    variant = Variant(7, [path.read_text("utf-8") for path in sorted(course.PACKAGE.glob("*.py"))])
    in_variant(code, str(tmp_path / "handout"))
    for number, exercise in EXERCISES.items():
        for _, name in exercise.functions:
            here = rename(name, variant.names)
            solution = (varied / f"exercise_{number}" / f"{here}.py").read_text("utf-8")
            file = solution.split("\n")[0].removeprefix("# ")
            text = (tmp_path / "handout" / file).read_text("utf-8")
            given, real = (course.functions(ast.parse(each)) for each in (text, (code / file).read_text("utf-8")))
            assert ast.unparse(ast.parse(solution).body[0].body[-1]) == ast.unparse(real[here].body[-1])
            assert ast.unparse(given[here].body[-1]).startswith("raise NotImplementedError")
    (tmp_path / "public").mkdir()
    for file in {file for exercise in EXERCISES.values() for file, _ in exercise.functions}:
        text = with_public_bodies((code / "minipass" / file).read_text("utf-8"), file, variant)
        (tmp_path / "public" / file).write_text(text, "utf-8")
    # This also runs the variant's own code, which has to get full points.
    in_variant(code, "grade", str(tmp_path / "public"), "--out", str(tmp_path), "--processes", "1")
    *_, (_, *points) = csv.reader((tmp_path / "grades.csv").open(encoding="utf-8"))
    assert int(points[-1]) <= 4, points


def with_public_bodies(text: str, file: str, variant: Variant) -> str:
    """A variant's file, the bodies of its exercises replaced by those of this package."""
    real = (course.PACKAGE / file).read_text("utf-8")
    lines, nodes, public = text.splitlines(keepends=True), course.functions(ast.parse(text)), real.splitlines(True)
    exercises = course.functions(ast.parse(real))
    names = [name for exercise in EXERCISES.values() for other, name in exercise.functions if other == file]
    for name in sorted(names, key=lambda name: -exercises[name].lineno):
        old, new = nodes[rename(name, variant.names)], exercises[name]
        lines[old.body[0].lineno - 1 : old.end_lineno] = public[new.body[0].lineno - 1 : new.end_lineno]
    return "".join(lines)


def test_a_folder_that_is_in_use_or_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for bad in (tmp_path, tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError):
            course.write_handout(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    run = subprocess.run(
        [sys.executable, "-m", "minipass.course", str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("minipass.course: ")
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


def write_code(folder: Path) -> None:
    """A handout without models, which graders do not need."""
    course.write_new(folder, course.handout())


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
    assert "needs exercise 2, 4, 5" in out

    fill_in(folder, but=(6, 10, 11))
    results, out = grade(folder, "-m", "exercise_6 or exercise_10 or exercise_11")
    for number in (6, 10, 11):
        for grader in graders_of(number):
            assert results.pop(grader.__name__).startswith(f"failure: NotImplementedError: Exercise {number}: ")
        assert f"0 of {EXERCISES[number].points} points" in out
    assert not results

    fill_in(folder, but=())
    results, out = grade(folder)
    assert set(results.values()) == {"passed"}
    assert all(f"{exercise.points} of {exercise.points} points" in out for exercise in EXERCISES.values())


def plant(path: Path, right: str, wrong: str) -> None:
    text = path.read_text("utf-8")
    assert right in text
    path.write_text(text.replace(right, wrong), "utf-8")


def test_one_exercise_is_graded_alone_and_says_what_to_look_at(tmp_path):
    write_code(tmp_path)
    fill_in(tmp_path, but=(1, 9))
    plant(tmp_path / "minipass" / "sampling.py", "(q.probs - p.gather(-1, q.tokens)).clamp(min=0)", "q.probs")
    results, out = grade(tmp_path, "-m", "exercise_5")
    assert set(results) == {grader.__name__ for grader in graders_of(5)}
    assert "of 10 points\n" in out
    assert "-2: the residual should be normalize(max(0, q - p)), at each place its own" in out
    assert "Exercise 1" not in out


def test_an_endless_loop_costs_points_of_its_exercise_and_those_that_need_it_say_so(tmp_path):
    write_code(tmp_path)
    fill_in(tmp_path, but=(4,))
    plant(tmp_path / "minipass" / "sampling.py", placeholder(4, "Sampling.race"), "while True: pass")
    plant(tmp_path / "minipass" / "sampling.py", placeholder(4, "uniform"), f"return key # {placeholder(4, 'uniform')}")
    plant(tmp_path / "tests" / "conftest.py", "SECONDS = 60", "SECONDS = 1")
    _, out = grade(tmp_path, "-k", "test_the_greedy_rule or test_n_tokens or test_a_parent_must")
    assert out.count("-1: no result after 1 seconds: is there an endless loop?") == 2
    assert "It needs exercise 4, where points are lost, too: look there first" in out
    assert "It needs exercise 2, 5, not graded in this run: `python -m pytest` grades all" in out


def test_a_syntax_error_costs_the_exercises_of_its_file_alone(tmp_path):
    write_code(tmp_path)
    fill_in(tmp_path, but=())
    plant(tmp_path / "minipass" / "sampling.py", "def reject(", "def reject((")
    results, out = grade(tmp_path, "-m", "exercise_2 or exercise_5 or exercise_6")
    line = (tmp_path / "minipass" / "sampling.py").read_text("utf-8").split("def reject")[0].count("\n") + 1
    assert {results[grader.__name__] for grader in graders_of(2)} == {"passed"}
    for grader in graders_of(5):
        assert f"sampling.py, line {line}: '(' was never closed" in results[grader.__name__]
    assert out.count("  sampling.py, line") == 1, "said once, in its exercise"
    for grader in graders_of(6):
        assert results[grader.__name__] == "skipped: needs exercise 4, 5"


def test_code_that_a_teachers_graders_refuse_gets_no_points_from_a_students_own(tmp_path):
    write_code(tmp_path)
    fill_in(tmp_path, but=())
    path, right = tmp_path / "minipass" / "sampling.py", "    total = residual"
    plant(path, right, f"    print(open('notes'))\n{right}")
    _, out = grade(tmp_path, "-m", "exercise_2 or exercise_5")
    line = path.read_text("utf-8").split("    print(")[0].count("\n") + 1
    assert "10 of 10 points\n" in out and "0 of 10 points\n" in out
    assert out.count(f"  sampling.py, line {line}: the graders do not allow 'open' in an exercise") == 1
    assert "FAILED" not in out, "the points are the last that is said"


def test_a_placeholder_that_is_left_as_a_comment_is_none(tmp_path):
    write_code(tmp_path)
    fill_in(tmp_path, but=())
    plant(tmp_path / "minipass" / "layout.py", "def tree(", f"# {placeholder(2, 'tree')}\ndef tree(")
    results, _ = grade(tmp_path, "-m", "exercise_11")
    assert set(results.values()) == {"passed"}


def needed(number: int) -> set[int]:
    """The exercise and all that must be done before it."""
    return {number}.union(*map(needed, EXERCISES[number].needs))


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_is_graded_by_what_it_needs_and_itself_alone(number, monkeypatch):
    """What others get wrong costs no points here."""

    def raises(*_, **__):
        raise NotImplementedError

    for other in EXERCISES.keys() - needed(number):
        for file, name in EXERCISES[other].functions:
            module = importlib.import_module(f"minipass.{file.removesuffix('.py')}")
            monkeypatch.setattr(operator.attrgetter(name)(module), "__code__", raises.__code__)
    for grader in graders_of(number):
        grader()


# Wrong solutions: each is the real code, as ast.unparse writes it, with one change.

MISTAKES = {
    "greedy at any temperature": (1, Sampling.distribution, "/ self.temperature", "/ 1e-9"),
    "bfloat16 as it is": (1, Sampling.distribution, "logits = logits.double()", "logits = +logits"),
    "top-k by threshold": (
        1, Sampling.distribution, "logits.topk(top_k, dim=-1)",
        "logits.topk(max(top_k, int((logits >= logits.topk(top_k)[0][..., -1:]).sum(-1).max())), dim=-1)",
    ),
    "n forgotten": (1, Sampling.distribution, "max(self.top_k, n)", "self.top_k"),
    "greedy: the first of n has all": (
        1, Sampling.distribution, "logits.double().softmax(-1).gather(-1, tokens)",
        "torch.eye(1, n, dtype=torch.float64)[0].expand(tokens.shape)",
    ),
    "greedy: n tokens made to sum to 1": (
        1, Sampling.distribution, "logits.double().softmax(-1).gather(-1, tokens)",
        "logits.double().gather(-1, tokens).softmax(-1)",
    ),
    "overflow": (1, Sampling.distribution, "logits - logits.amax(-1, keepdim=True)", "logits"),
    "accepts after a rejection": (
        6, accept, "right[:, None] | nodes.elsewhere",
        "right[:, None] | ~torch.eye(len(nodes.number), dtype=torch.bool)",
    ),
    "sorted, and taken for the vocabulary": (
        1, Sampling.distribution, "return Distribution(tokens, probs)",
        "return Distribution(torch.arange(probs.shape[-1]).expand(probs.shape), probs)",
    ),
    "crossing token left out": (1, Sampling.distribution, "probs.cumsum(-1) - probs", "probs.cumsum(-1)"),
    "top-p: one too many at equality": (1, Sampling.distribution, "likelier < self.top_p", "likelier <= self.top_p"),
    "top-p by threshold": (
        1, Sampling.distribution, "torch.where(likelier < self.top_p, probs, 0.0)",
        "probs.where(probs >= probs.where(likelier < self.top_p, 1.0).amin(-1, keepdim=True), 0.0)",
    ),
    "not normalised": (1, Sampling.distribution, "probs / probs.sum(-1, keepdim=True)", "probs"),
    "logits shifted in place": (
        1, Sampling.distribution, "logits = logits.double()",
        "logits.sub_(logits.amax(-1, keepdim=True)); logits = logits.double()",
    ),
    "greedy marks in the logits": (
        1, Sampling.distribution, "if self.temperature == 0:",
        "if self.temperature == 0 and logits.neg_() is not None:",
    ),
    "only top-p comes sorted": (
        1, Sampling.distribution, "probs = probs / probs.sum(-1, keepdim=True)",
        "probs = probs / probs.sum(-1, keepdim=True); tokens = torch.arange(probs.shape[-1]).expand(probs.shape)",
    ),
    "top-p of all rows together": (
        1, Sampling.distribution, "likelier < self.top_p", "(likelier < self.top_p).all(0, keepdim=True)",
    ),
    "top-p of at least two": (1, Sampling.distribution, "likelier < self.top_p", "likelier < max(self.top_p, 0.3)"),
    "top-p of what top-k left, not made to sum to 1": (
        1, Sampling.distribution, "probs = logits.softmax(-1)",
        "probs = logits.softmax(-1) * (0.5 if self.top_k else 1)",
    ),
    "float32": (1, Sampling.distribution, "logits.softmax(-1)", "logits.float().softmax(-1).double()"),
    "parents below -1": (2, tree, "(parents < CACHE_END) | ", ""),
    "parents of the first text checked": (2, tree, "parents >= np.arange", "parents[:1] >= np.arange"),
    "siblings see each other": (
        2, tree, "visible[batch, parents[:, row]]",
        "visible[batch, parents[:, row]] | (np.arange(n_rows) < row) & (parents == parents[:, row:row + 1])",
    ),
    "all groups of full length": (
        2, with_groups, "np.asarray(n_lookahead, dtype=np.int64)", "np.asarray(np.max(n_lookahead), dtype=np.int64)",
    ),
    "position from 1": (2, tree, "np.count_nonzero(visible, axis=-1) - 1", "np.count_nonzero(visible, axis=-1)"),
    "parents not inherited": (2, tree, "visible[batch, parents[:, row]]", "visible[batch, parents[:, row]] & False"),
    "parents not checked": (2, tree, ".any()", ".all() and False"),
    "look-ahead numbers dropped": (2, tree, "np.array(lookahead, dtype=np.int64)", "np.zeros(0, dtype=np.int64)"),
    "groups one after the other": (
        2, with_groups, "rows[:, first_row[lengths > 0]] = anchors[:, lengths > 0]",
        "rows[:, first_row[:1]] = anchors[:, :1]",
    ),
    "real rows always a path": (2, with_groups, "[parents, hanging]", "[path(len(parents)), hanging]"),
    "anchor off by one": (2, with_groups, "= anchors[:, lengths > 0]", "= anchors[:, lengths > 0] - 1"),
    "anchors of the first text for all": (2, with_groups, "= anchors[:, lengths > 0]", "= anchors[:1, lengths > 0]"),
    "numbers do not begin again": (
        2, with_groups, "np.concatenate([np.arange(0), *map(np.arange, lengths)])", "np.arange(lengths.sum())",
    ),
    "mask in float32": (3, KVCache.mask, "dtype=self.pairs.dtype", "dtype=torch.float32"),
    "values clamped": (3, KVCache.store, "pairs.nan_to_num(0, 0, 0)", "pairs.nan_to_num(0, 0, 0).clamp(-1e4, 1e4)"),
    "garbage seen": (3, KVCache.mask, "(0, self.max_len))", "(0, self.max_len), value=True)"),
    "cache not seen": (3, KVCache.mask, "(self.max_len, 0), value=True", "(self.max_len, 0), value=False"),
    "cache of the first text for all": (3, KVCache.mask, "- self.length)", "- self.length[:1].expand(3))"),
    "mask upside down": (3, KVCache.mask, "layout.visible,", "layout.visible.transpose(1, 2),"),
    "layout of the first text for all": (3, KVCache.mask, "layout.visible,", "layout.visible[:1],"),
    "layouts held": (
        3, KVCache.mask, "if layout not in self.masks:",
        "self.masks = dict(self.masks)\n    if layout not in self.masks:",
    ),
    "first layer always": (3, KVCache.store, "self.pairs[layer]", "self.pairs[0]"),
    "slots of the first text for all": (3, KVCache.store, "[self.batch, slots]", "[self.batch, slots[:1]]"),
    "length moved": (
        3, KVCache.store, "return self.pairs[layer]", "self.length += slots.shape[1]; return self.pairs[layer]",
    ),
    "rows not counted from the length": (3, KVCache.gather, "self.length[:, None] + rows", "rows"),
    "rows one by one": (
        3, KVCache.gather,
        "self.pairs[:, self.batch, self.slots(rows.shape[1])] = self.pairs[:, self.batch, self.length[:, None] + rows]",
        "for k in range(rows.shape[1]): self.pairs[:, self.batch[:, 0], self.length + k] = "
        "self.pairs[:, self.batch[:, 0], self.length + rows[:, k]]",
    ),
    "pairs of the pass alone": (3, KVCache.store, "return self.pairs[layer]", "return pairs"),
    "keys alone": (
        3, KVCache.gather,
        "self.slots(rows.shape[1])] = self.pairs[:, self.batch, self.length[:, None] + rows]",
        "self.slots(rows.shape[1]), 0] = self.pairs[:, self.batch, self.length[:, None] + rows, 0]",
    ),
    "rows sorted": (3, KVCache.gather, "[:, None] + rows", "[:, None] + rows.sort(-1).values"),
    "sign kept": (4, uniform, "& 2 ** 53 - 1", "& -1"),
    "can be 0": (4, uniform, "bits | 1", "bits"),
    "can be 1": (4, uniform, "(bits | 1).double()", "(bits.double() + 1)"),
    "24 bits": (4, uniform, "bits | 1", "bits >> 29 << 29 | 1 << 29"),
    "a race in float32": (4, Sampling.race, "given.tokens).log()", "given.tokens).float().log()"),
    "a race of 1 - u": (4, Sampling.race, "-uniform(key, given.tokens)", "-(1 - uniform(key, given.tokens))"),
    "lower bits": (4, uniform, ">> 11", ">> 60"),
    "token not hashed": (4, uniform, "mix(key[..., None] + token)", "(mix(key[..., None]) + token)"),
    "key left out": (4, uniform, "key[..., None] + token", "0 * key[..., None] + token"),
    "noise of a slot": (
        4, Sampling.race, "given.tokens).log()",
        "torch.arange(given.tokens.shape[-1]).expand(given.tokens.shape)).log()",
    ),
    "slot instead of token": (4, Sampling.race, "given.tokens.gather(-1, first.indices)", "first.indices"),
    "the likeliest follow": (4, Sampling.race, "speed.topk(n)", "given.probs.topk(n)"),
    "the last come first": (
        4, Sampling.race, "given.tokens.gather(-1, first.indices)", "given.tokens.gather(-1, first.indices).flip(-1)",
    ),
    "shares of the first n alone": (4, Sampling.race, "speed.sum(-1,", "first.values.sum(-1,"),
    "speeds for shares": (4, Sampling.race, "first.values / speed.sum(-1, keepdim=True)", "first.values"),
    "probabilities for shares": (
        4, Sampling.race, "first.values / speed.sum(-1, keepdim=True)", "given.probs.gather(-1, first.indices)",
    ),
    "shares of the first tokens given": (4, Sampling.race, "first.values /", "speed[..., :n] /"),
    "greedy: shares of the first n alone": (
        4, Sampling.race, "given.probs[..., :n]", "given.probs[..., :n] / given.probs[..., :n].sum(-1, keepdim=True)",
    ),
    "greedy: a race": (4, Sampling.race, "self.temperature == 0", "False"),
    "a generator's random numbers": (4, Sampling.race, "uniform(key, given.tokens)", "torch.rand_like(given.probs)"),
    "the same random numbers at each call": (
        4, Sampling.race, "uniform(key, given.tokens)",
        "torch.rand(*key.shape, 10, generator=torch.Generator().manual_seed(0)).double().gather(-1, given.tokens)",
    ),
    "one key for all rows": (4, Sampling.race, "uniform(key,", "uniform(key[:1].expand(key.shape),"),
    "noise of the place in the batch": (4, Sampling.race, "uniform(key,", "uniform(mix(key + torch.arange(len(key))),"),
    "numbers of another row": (4, uniform, "(bits | 1)", "(bits.flip(0) | 1)"),
    "random numbers of its own": (5, reject, "u * p_draft", "torch.rand_like(u) * p_draft"),
    "tokens of q taken for the vocabulary": (5, reject, "p.gather(-1, q.tokens)", "p[..., :q.tokens.shape[-1]]"),
    "no residual": (5, reject, "(q.probs - p.gather(-1, q.tokens)).clamp(min=0)", "q.probs"),
    "the residual of another temperature": (
        5, reject, "(q.probs - p.gather", "(q.probs.sqrt() / q.probs.sqrt().sum(-1, keepdim=True) - p.gather",
    ),
    "residual not normalised": (5, reject, "residual / total", "residual"),
    "absolute residual": (5, reject, ".clamp(min=0)", ".abs()"),
    "p and q swapped": (5, reject, "u * p_draft < q_draft", "u * q_draft < p_draft"),
    "all drafts accepted": (5, reject, "u * p_draft < q_draft", "u < 2"),
    "no draft accepted": (5, reject, "u * p_draft < q_draft", "u > 2"),
    "u squared": (5, reject, "u * p_draft < q_draft", "u * u * p_draft < q_draft"),
    "u not used": (5, reject, "u * p_draft < q_draft", "p_draft <= q_draft"),
    "one u for all drafts": (5, reject, "u * p_draft < q_draft", "u[:, :1] * p_draft < q_draft"),
    "a floor": (5, reject, "& (p_draft > 0)", "& (p_draft > -1)"),
    "a draft never drawn takes from q": (5, reject, "(p_draft > 0)[..., None] & (total > 0)", "total > 0"),
    "p taken as normalised": (5, reject, "p / p.sum(-1, keepdim=True).clamp(min=1e-300)", "p"),
    "q's slot for the draft's": (
        5, reject, "torch.where(q.tokens == draft[..., None], q.probs, 0.0).sum(-1)",
        "q.probs.gather(-1, draft.clamp(max=q.probs.shape[-1] - 1)[..., None]).squeeze(-1)",
    ),
    "p keeps the draft": (5, reject, "p.scatter(-1, draft[..., None], 0.0)", "p"),
    "p changed": (
        5, reject, "p / p.sum(-1, keepdim=True).clamp(min=1e-300)", "p.div_(p.sum(-1, keepdim=True).clamp(min=1e-300))",
    ),
    "coupled: drawn after the node itself": (6, accept, "drawn.take_along_dim(nodes.parents, 1)", "drawn[:, 1:]"),
    "coupled: drawn after the draft before": (6, accept, "drawn.take_along_dim(nodes.parents, 1)", "drawn[:, :-1]"),
    "coupled: parents of the first text for all": (6, accept, "nodes.parents, 1)", "nodes.parents[:1], 1)"),
    "paths of the first text for all": (6, accept, "| nodes.elsewhere)", "| nodes.elsewhere[:1])"),
    "noise of another stream": (6, accept, "keys[TARGET]", "keys[TARGET + 1]"),
    "noise of the root for all": (6, accept, "keys[TARGET]", "keys[TARGET, :, :1].expand(-1, len(nodes.number))"),
    "next token from q": (6, accept, "q = Distribution(q.tokens, left)", "pass"),
    "siblings all against the same q": (
        6, accept, "left[:, parents], p[:, parents] = reject", "left[:, parents], _ = reject",
    ),
    "one number for siblings": (
        6, accept, "uniform(keys[ACCEPTANCE][:, parents], tokens[..., None])",
        "uniform(keys[ACCEPTANCE][:, parents], tokens[..., None] * 0)",
    ),
    "one number for all places": (6, accept, "keys[ACCEPTANCE][:, parents]", "keys[ACCEPTANCE][:, parents * 0]"),
    "q of the node itself": (
        6, accept, "Distribution(q.tokens[:, parents], left[:, parents])",
        "Distribution(q.tokens[:, siblings], left[:, siblings])",
    ),
    "siblings in the wrong order": (6, accept, "in nodes.by_rank", "in nodes.by_rank[::-1]"),
    "p of the node before": (6, accept, "drafts.p.clone()", "drafts.p.roll(1, 1)"),
    "q changed": (6, accept, "q.probs.clone()", "q.probs.contiguous()"),
    "a test's number from a generator": (
        6, accept, "uniform(keys[ACCEPTANCE][:, parents], tokens[..., None]).squeeze(-1)",
        "torch.rand(tokens.shape, dtype=torch.float64)",
    ),
    "the same numbers at each test": (
        6, accept, "uniform(keys[ACCEPTANCE][:, parents], tokens[..., None]).squeeze(-1)",
        "torch.rand(tokens.shape, generator=torch.Generator().manual_seed(len(siblings)), dtype=torch.float64)",
    ),
    "the noise that drew the draft tests it": (6, accept, "keys[ACCEPTANCE]", "keys[1]"),
    "the noise of a test draws": (6, accept, "keys[TARGET]", "keys[TARGET if drafts.p is None else ACCEPTANCE]"),
    "tested by its own place": (6, accept, "keys[ACCEPTANCE][:, parents]", "keys[ACCEPTANCE][:, siblings]"),
    "a later sibling accepted too": (6, accept, "fits & ~taken[:, parents]", "fits"),
    "last node by the number accepted": (6, accept, "(accepted * nodes.number).amax(1)", "accepted.sum(1) - 1"),
    "p used up": (6, accept, "drafts.p.clone()", "drafts.p"),
    "the root's own place": (7, Decoder.noise, "torch.arange(1, 2 + depth", "torch.arange(1 + depth"),
    "one depth too few": (7, Decoder.noise, "torch.arange(1, 2 + depth", "torch.arange(1, 1 + depth"),
    "place in the window": (7, Decoder.noise, "self.start + self.cache.length", "self.cache.length"),
    "place of the first text": (7, Decoder.noise, "self.cache.length)", "self.cache.length[:1])"),
    "place in the turn": (7, Decoder.noise, "(self.start + self.cache.length)", "(0 * self.cache.length)"),
    "one stream for all": (7, Decoder.noise, "mix(self.keys +", "mix(self.keys[:1].expand(3, -1, -1) +"),
    "one text's key for all": (7, Decoder.noise, "mix(self.keys +", "mix(self.keys[:, :1] +"),
    "keys not hashed": (7, Decoder.noise, "return mix(self.keys", "return (self.keys"),
    "places hashed alone": (7, Decoder.noise, "mix(self.keys + root + ", "self.keys + mix(root + "),
    "greedy keys of one depth": (7, Decoder.noise, "self.keys.expand(-1, -1, 1 + depth)", "self.keys"),
    "the length moves on": (
        7, Decoder.noise, "(self.start + self.cache.length)[:, None]",
        "(self.start + self.cache.length)[:, None]; self.cache.length += 1",
    ),
    "no residual connection": (8, DraftHead.forward, "return hidden +", "return"),
    "told the token first": (8, DraftHead.forward, "[hidden, before]", "[before, hidden]"),
    "the token is not told": (8, DraftHead.forward, "[hidden, before]", "[hidden, 0 * before]"),
    "added to the token": (8, DraftHead.forward, "return hidden +", "return before +"),
    "the exact gelu": (8, DraftHead.forward, ", approximate='tanh'", ""),
    "no gelu": (8, DraftHead.forward, "F.gelu(", "(lambda x, approximate: x)("),
    "all rows are told the first one's token": (
        8, DraftHead.forward, "[hidden, before]", "[hidden, before[:1].expand(before.shape)]",
    ),
    "told the token after": (8, DraftHead.forward, "[hidden, before]", "[hidden, before.roll(-1, 0)]"),
    "hidden changed": (8, DraftHead.forward, "return hidden +", "return hidden.add_(0.0).mul_(1.0).add_(1e-3) +"),
    "a chain in place of the tree": (
        9, Decoder.turn, "self.draft(shape,",
        "self.draft(Shape(chain(shape.tree.depth[-1]), shape.n_lookahead),",
    ),
    "groups complete": (
        9, Decoder.turn, "self.draft(shape,",
        "self.draft(Shape(DraftTree(shape.tree.parents, keep=shape.tree.keep), shape.n_lookahead),",
    ),
    "all nodes of the tree": (
        9, Decoder.turn, "rows = torch.cat",
        "nodes = shape.on(self.device, self.by_parent)\n    rows = torch.cat",
    ),
    "depths of the first text for all": (9, Decoder.turn, "nodes.depth[None]", "nodes.depth[None, :1]"),
    "last nodes in the first text's tree": (9, Decoder.turn, "pick(each, last)", "pick(each[:1], last)"),
    "nodes numbered among those kept": (9, Decoder.turn, "nodes.kept, nodes.path", "nodes.number[None], nodes.path"),
    "the host is told numbers among those kept": (
        9, Decoder.turn, "[n_accepted, node, told]", "[n_accepted, last, told]",
    ),
    "candidates not handed on": (
        9, Decoder.turn, "logits[batch, group] if self.scores_candidates else logits[:, :0]", "logits[:, :0]",
    ),
    "candidates of the root": (9, Decoder.turn, "logits[batch, group] if", "logits[batch, group * 0] if"),
    "rejection: noise of the root for all nodes": (
        9, Decoder.turn, "nodes.depth[None]",
        "(nodes.depth if self.rule == COUPLED else nodes.depth * 0)[None]",
    ),
    "noise by node": (9, Decoder.turn, "nodes.depth[None]", "nodes.number.clamp(max=keys.shape[-1] - 1)[None, None]"),
    "length by node": (9, Decoder.turn, "(1 + n_accepted)", "(1 + last)"),
    "length of the first text": (9, Decoder.turn, "(1 + n_accepted)", "(1 + n_accepted[:1])"),
    "targets of the rows after": (
        9, Decoder.turn, "distribution(logits[:, :n_real])", "distribution(logits.roll(-1, 1)[:, :n_real])",
    ),
    "group of the root": (9, Decoder.turn, "nodes.group_rows[last]", "nodes.group_rows[last * 0]"),
    "group by the number accepted": (9, Decoder.turn, "nodes.group_rows[last]", "nodes.group_rows[n_accepted]"),
    "group of the first text": (9, Decoder.turn, "nodes.group_rows[last]", "nodes.group_rows[last[:1]]"),
    "nothing rolled back": (9, Decoder.turn, "1 + n_accepted)", "rows.shape[1])"),
    "accepted path not contiguous": (9, Decoder.turn, "self.cache.gather(way)", "pass"),
    "ended texts grow": (9, Decoder.turn, "self.active * (1 + n_accepted)", "1 + n_accepted"),
    "noise of the root for all nodes": (9, Decoder.turn, "nodes.depth[None]", "nodes.depth[None] * 0"),
    "copied drafts ignored": (9, Decoder.turn, "keys, copied)", "keys, None)"),
    "the host is told one more": (9, Decoder.turn, "[n_accepted, node, told]", "[n_accepted + 1, node, told]"),
    "the host is told the first drafts": (9, Decoder.turn, "rows.gather(1, way[:, 1:])", "rows[:, 1:way.shape[1]]"),
    "new root for the token before it": (9, Decoder.turn, "pick(rows, last)", "root"),
    "two passes": (
        9, Decoder.turn, "states = ",
        "self.model.hidden(rows, Shape(shape.tree).on(self.device).layout, self.cache); states = ",
    ),
    "verifies first": (10, TwoPass.schedule, "[(draft, None), (verify, None)]", "[(verify, None), (draft, None)]"),
    "verifying looks ahead": (10, TwoPass.schedule, "(verify, None)", "(Shape(verify.tree, draft.n_lookahead), None)"),
    "drafts in the first turn": (
        10, fused, "ahead = ([PromptLookup() for _ in texts.texts], 0)",
        "ahead = ([PromptLookup() for _ in texts.texts], 9)",
    ),
    "looks ahead as deep as it verifies": (
        10, fused, "Shape(drafts, depth)", "Shape(drafts, drafts.depth[-1])",
    ),
    "tree not cut": (10, fused, "tree.cut(ahead)", "(tree if ahead else tree.cut(0))"),
    "always the tree before": (10, fused, "ahead = shape.n_lookahead", "ahead = max(ahead, depth)"),
    "trees taken before their turns": (10, fused, "in trees:", "in joined([next(trees), next(trees)], trees):"),
    "copies of the first turn": (10, fused, "if lookup else None", "if lookup and ahead == 0 else None"),
    "groups left out": (10, fused, "Shape(drafts, depth)", "Shape(DraftTree(drafts.parents), depth)"),
    "a chain of its own": (10, fused, "Shape(drafts, depth)", "Shape(chain(min(depth, ahead)), depth)"),
    "copies not handed on": (10, fused, "yield (shape, copied)", "yield (shape, None)"),
    "copies look ahead": (10, fused, "else 0)", "else depth)"),
    "copies never look ahead": (10, fused, "any((tokens[0] < 0 for tokens in copied))", "False"),
    "one token is enough": (10, fused, "2 if drafts.parents else 1", "1"),
    "one token is never enough": (10, fused, "2 if drafts.parents else 1", "2"),
    "cut itself": (11, rows_after_cuts, "[..., None] + 1 +", "[..., None] +"),
    "KL the wrong way": (11, lookahead_loss, "(log_q.exp() * (log_q - log_p))", "(log_p.exp() * (log_p - log_q))"),
    "KL with 1e-6 in the logarithm": (
        11, lookahead_loss, "(log_q - log_p)", "((log_q.exp() + 1e-06) / (log_p.exp() + 1e-06)).log()",
    ),
    "drafts detached": (11, lookahead_loss, "draft_logits.float()", "draft_logits.detach().float()"),
    "one mean for all positions": (
        11, lookahead_loss, "squeeze(-1).mean((0, 1))", "squeeze(-1).mean().expand(n_lookahead)",
    ),
    "bfloat16 kept": (11, lookahead_loss, "draft_logits.float()", "draft_logits"),
    "text's bfloat16 kept": (11, lookahead_loss, "cuts, n_lookahead).float()", "cuts, n_lookahead)"),
    "look-ahead rows backwards": (11, rows_after_cuts, "arange(n_lookahead)", "arange(n_lookahead).flip(0)"),
    "cuts of the first text": (11, rows_after_cuts, "torch.from_numpy(cuts)", "torch.from_numpy(cuts[:1] + 0 * cuts)"),
    "the text's token after": (11, lookahead_loss, "rows_after_cuts(targets,", "rows_after_cuts(targets.roll(-1, 1),"),
    "twice the total variation": (11, lookahead_loss, "TV_SCALE * 0.5", "TV_SCALE"),
    "target not detached": (11, lookahead_loss, "text_logits.detach()", "text_logits"),
}  # fmt: skip


def planted(mistake: str, monkeypatch) -> Iterator[tuple[int, Exception | None]]:
    """Of each grader of the exercise, while the mistake is there: its points, and what it raised."""
    number, function, right, wrong = MISTAKES[mistake]
    source = ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    assert right in source, f"{function.__name__} changed: plant this mistake anew"
    scope = dict(function.__globals__)
    exec(source.replace(right, wrong), scope)
    monkeypatch.setattr(function, "__code__", scope[function.__name__].__code__)  # wherever it was imported to
    for grader in graders_of(number):
        raised = None
        try:
            grader()
        except (AssertionError, RuntimeError, IndexError, ValueError) as error:
            raised = error
        yield points(grader), raised


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_solution_loses_points_with_a_message_that_helps(mistake, monkeypatch):
    # An error of PyTorch's alone would not tell a student what is wrong.
    assert any(isinstance(raised, AssertionError) for _, raised in planted(mistake, monkeypatch)), "no grader noticed"


@pytest.mark.parametrize(("mistake", "n_points"), {
    "mask in float32": 1, "layout of the first text for all": 1, "shares of the first n alone": 1,
    "greedy: n tokens made to sum to 1": 1, "coupled: parents of the first text for all": 1,
    "last nodes in the first text's tree": 1, "all nodes of the tree": 1,
    "sign kept": 3, "position from 1": 1, "residual not normalised": 2, "p changed": 1,
    "accepts after a rejection": 3, "next token from q": 4, "q changed": 2, "p used up": 2,
    "accepted path not contiguous": 3, "the host is told one more": 2, "the host is told the first drafts": 2,
}.items())  # fmt: skip
def test_a_slip_costs_few_points(mistake, n_points, monkeypatch):
    lost = [(n, raised) for n, raised in planted(mistake, monkeypatch) if raised is not None]
    assert all(isinstance(raised, AssertionError) for _, raised in lost), "each message should help"
    assert sum(n for n, _ in lost) == n_points
