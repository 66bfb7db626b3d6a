"""The exercises of the course, and the pytest hooks that grade them. In a handout this file is tests/conftest.py.

A grader carries the mark of its exercise with its points, `@pytest.mark.exercise_4(2)`. It is skipped while an
exercise that it needs is still to be written, so that no one looks for a mistake where there is none.
"""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Exercise(NamedTuple):
    """functions: (file in minipass/, qualified name) of what is to be written; needs: exercises to be done before."""

    title: str
    points: int
    needs: tuple[int, ...]
    functions: tuple[tuple[str, str], ...]


EXERCISES = {
    1: Exercise("Probabilities", 8, (), (("sampling.py", "probabilities"),)),
    2: Exercise("Mask and positions", 8, (), (("layout.py", "tree"),)),
    3: Exercise("The cache", 8, (), (("model.py", "KVCache.mask"), ("model.py", "KVCache.store"))),
    4: Exercise("Look-ahead rows", 10, (2,), (("layout.py", "with_groups"), ("layout.py", "lookahead_ids"))),
    5: Exercise("Acceptance", 12, (), (("sampling.py", "speculative_accept"),)),
    6: Exercise(
        "Algorithm 1", 14, (1, 2, 3, 4, 5), tuple(("rounds.py", f) for f in ("draft_pass", "verify_pass", "two_pass"))
    ),
    7: Exercise("The fused round", 16, (1, 2, 3, 4, 5), (("rounds.py", "fused_round"),)),
    8: Exercise("The look-ahead loss", 10, (2, 4), (("losses.py", "rows_after_cuts"), ("losses.py", "lookahead_loss"))),
}
PACKAGE = Path(__file__).parents[1] / "minipass"  # of the handout


def placeholder(number: int, function: str) -> str:
    """The statement that stands where a function is to be written."""
    return f'raise NotImplementedError("Exercise {number}: write {function}, see ASSIGNMENT.md")'


def to_be_written(number: int) -> bool:
    """Whether a placeholder of this exercise is still there."""
    return any(
        placeholder(number, function) in (PACKAGE / file).read_text("utf-8")
        for file, function in EXERCISES[number].functions
    )


def pytest_itemcollected(item) -> None:
    item.user_properties += [
        (mark.name, mark.args[0]) for mark in item.iter_markers() if mark.name.startswith("exercise_")
    ]


def pytest_runtest_setup(item) -> None:
    import pytest  # here, since writing a handout needs none

    for mark, _ in item.user_properties:
        missing = [number for number in EXERCISES[_number(mark)].needs if to_be_written(number)]
        if missing:
            pytest.skip("needs exercise " + ", ".join(map(str, missing)))


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
                    reason = (crash.message if crash else "see above").splitlines()[0]
                    unwritten = reason.startswith("NotImplementedError: Exercise ")
                    notes[mark].append(reason if unwritten else f"-{points}: {reason.removeprefix('AssertionError: ')}")
    for mark in sorted(gained.keys() | notes.keys()):
        exercise = EXERCISES[_number(mark)]
        terminalreporter.section(f"Exercise {_number(mark)}, {exercise.title}")
        terminalreporter.line(f"{gained[mark]} of {exercise.points} points")
        for note in dict.fromkeys(notes[mark]):  # what is yet to be written or needed is said once
            terminalreporter.line(f"  {note}")


def _number(mark: str) -> int:
    return int(mark.removeprefix("exercise_"))
