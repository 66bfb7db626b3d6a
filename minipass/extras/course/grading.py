"""The exercises of the course, and the pytest hooks that grade them. In a handout this file is tests/conftest.py.

A file with a syntax error is replaced by tests/blank, as it was handed out: it costs its own exercises alone. So does
code that a teacher's graders would refuse.
A grader carries the mark of its exercise with its points, `@pytest.mark.exercise_4(2)`. It is skipped while an
exercise that it needs is still to be written, so that no one looks for a mistake where there is none.
"""

import ast
import importlib.util
import signal
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minipass.extras.course.submit import FILES, Refused, parse, taken

SECONDS = 60  # for one grader; the slowest takes a few


class Exercise(NamedTuple):
    """functions: (file in minipass/, qualified name) of what is to be written; needs: exercises to be done before."""

    title: str
    points: int
    needs: tuple[int, ...]
    functions: tuple[tuple[str, str], ...]


EXERCISES = {
    1: Exercise("Distributions", 8, (), (("sampling.py", "Sampling.distribution"),)),
    2: Exercise("Mask and positions", 10, (), (("layout.py", "tree"), ("layout.py", "with_groups"))),
    3: Exercise("The cache", 8, (), tuple(("model.py", f"KVCache.{name}") for name in ("mask", "store", "gather"))),
    4: Exercise("Noise and the race", 8, (), (("sampling.py", "uniform"), ("sampling.py", "Sampling.race"))),
    5: Exercise("The acceptance rule", 10, (), (("sampling.py", "reject"),)),
    6: Exercise("Acceptance along a tree", 12, (2, 4, 5), (("trees.py", "accept"),)),
    7: Exercise("The coupled rule", 4, (), (("decode.py", "Decoder.noise"),)),
    8: Exercise("The draft head", 4, (), (("model.py", "DraftHead.forward"),)),
    9: Exercise("The turn", 16, (1, 2, 3, 4, 5, 6, 7), (("decode.py", "Decoder.turn"),)),
    10: Exercise("Schedules", 6, (), (("decode.py", "TwoPass.schedule"), ("decode.py", "fused"))),
    11: Exercise("The look-ahead loss", 8, (2,), (("losses.py", "rows_after_cuts"), ("losses.py", "lookahead_loss"))),
}
PACKAGE = Path(__file__).parents[1] / "minipass"  # of the handout
broken: dict[str, str] = {}  # files with a syntax error, and where
refused: dict[int, str] = {}  # exercises that would get no points, and why
stuck: set[str] = set()  # exercises of which a grader took too long


def placeholder(number: int, function: str) -> str:
    """The statement in place of a function that is to be written."""
    return f'raise NotImplementedError("Exercise {number}: write {function}, see ASSIGNMENT.md")'


@cache
def to_be_written(number: int) -> bool:
    """Whether a placeholder of this exercise is still there, not just as a comment."""
    return any(file in broken for file, _ in EXERCISES[number].functions) or any(
        ast.unparse(node) == ast.unparse(ast.parse(placeholder(number, function)))
        for file, function in EXERCISES[number].functions
        for node in ast.walk(ast.parse((PACKAGE / file).read_text("utf-8")))
        if isinstance(node, ast.Raise)
    )


class Blanks:
    """Finds modules of broken files where they still are as they were handed out."""

    @staticmethod
    def find_spec(name: str, *_):
        package, _, module = name.rpartition(".")
        if package == "minipass" and f"{module}.py" in broken:
            return importlib.util.spec_from_file_location(name, Path(__file__).parent / "blank" / f"{module}.py")
        return None


def pytest_configure() -> None:
    texts = {file: (PACKAGE / file).read_bytes() for file in FILES}
    for file, text in texts.items():
        try:
            parse(file, text)
        except Refused as error:
            broken[file] = str(error)
    for number, exercise in EXERCISES.items():
        for file, name in exercise.functions:
            try:
                taken(file, [name], texts[file], (Path(__file__).parent / "blank" / file).read_text("utf-8"))
            except Refused as error:
                refused[number] = str(error)
    sys.meta_path.insert(0, Blanks)


def pytest_itemcollected(item) -> None:
    item.user_properties += [
        (mark.name, mark.args[0]) for mark in item.iter_markers() if mark.name.startswith("exercise_")
    ]


def pytest_runtest_setup(item) -> None:
    import pytest  # here, since writing a handout needs none

    for mark, _ in item.user_properties:
        if _number(mark) in refused:
            pytest.fail(refused[_number(mark)], pytrace=False)
        if mark in stuck:
            pytest.fail("not run, since another grader of this exercise took too long", pytrace=False)
        missing = [number for number in EXERCISES[_number(mark)].needs if to_be_written(number)]
        if missing:
            pytest.skip(f"needs exercise {_list(missing)}")
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, lambda *_: _too_long({mark for mark, _ in item.user_properties}))
        signal.alarm(SECONDS)


def pytest_runtest_teardown(item) -> None:
    if hasattr(signal, "SIGALRM"):
        signal.alarm(0)


def pytest_terminal_summary(terminalreporter) -> None:
    """For each exercise that was graded: the points, and for each lost one why."""
    gained, notes = defaultdict(int), defaultdict(list)
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for mark, points in getattr(report, "user_properties", ()):
                if outcome == "passed":
                    gained[mark] += points
                elif outcome == "skipped":
                    notes[mark].append(report.longrepr[2].removeprefix("Skipped: "))
                elif outcome in ("failed", "error"):
                    crash = getattr(report.longrepr, "reprcrash", None)  # None: pytest itself broke
                    reason = (crash.message if crash else str(report.longrepr)).splitlines()[0].removeprefix("Failed: ")
                    unwritten = reason.startswith("NotImplementedError: Exercise ") or reason in refused.values()
                    notes[mark].append(reason if unwritten else f"-{points}: {reason.removeprefix('AssertionError: ')}")
    for mark in sorted(gained.keys() | notes.keys(), key=_number):
        exercise = EXERCISES[_number(mark)]
        terminalreporter.section(f"Exercise {_number(mark)}, {exercise.title}")
        terminalreporter.line(f"{gained[mark]} of {exercise.points} points")
        for note in dict.fromkeys(notes[mark]):  # what is yet to be written or needed is said once
            terminalreporter.line(f"  {note}")
        if any(note.startswith("-") for note in notes[mark]):
            doubtful = [n for n in exercise.needs if gained.get(f"exercise_{n}", 0) < EXERCISES[n].points]
            wrong = [n for n in doubtful if notes.get(f"exercise_{n}")]
            unseen = [n for n in doubtful if n not in wrong]
            for needed, what in (
                (wrong, "where points are lost, too: look there first"),
                (unseen, "not graded in this run: `python -m pytest` grades all"),
            ):
                if needed:
                    terminalreporter.line(f"  It needs exercise {_list(needed)}, {what}")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _number(mark: str) -> int:
    return int(mark.removeprefix("exercise_"))


def _too_long(marks: set[str]) -> None:
    stuck.update(marks)
    raise AssertionError(f"no result after {SECONDS} seconds: is there an endless loop?")
