"""Grades a class: `python -m minipass.course grade FOLDER...`, submissions as folders or zips.

Of a submission only the functions of the exercises are read, with imports and helpers that stand beside them. Each
exercise runs in a process of its own, in the real package with the student's code for this exercise alone: a mistake
is paid once, and an endless loop or an exit costs one exercise. Nothing else that was handed in is looked at, no pytest
runs, and the graders' numbers are new each time. Code that reaches for what grades it is refused: a fence that keeps
honest people honest. Where that is not enough, grade in a container.
"""

import argparse
import ast
import contextlib
import csv
import json
import multiprocessing
import os
import secrets
import time
import zipfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import wait
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minipass.errors import InputError
from minipass.extras.course import PACKAGE
from minipass.extras.course.grading import EXERCISES
from minipass.extras.course.submit import Refused, taken
from minipass.files import atomic_write, check_replaceable, heedless

MOST_SECONDS = 300  # for an exercise of the real package
SLOWER, MORE_SECONDS = 10, 5  # a submission may take so many times as long as that, and so much longer
LARGEST_FILE = 10**6  # bytes
FILES = sorted({file for exercise in EXERCISES.values() for file, _ in exercise.functions})


class Job(NamedTuple):
    """One exercise of one submission. files: the submission's text, or why there is none, by file name."""

    student: str
    number: int
    files: dict[str, str | Refused]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minipass.course grade", description="Grades submissions.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a submission (folder or zip), or many")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="FOLDER", help="for grades.csv and grades.json")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), metavar="N", help="exercises at once (default: one a core)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the graders' numbers, to repeat a run")
    given = parser.parse_args(arguments)
    found = submissions(given.folders)
    check_replaceable(given.out / "grades.csv", "submission,exercise")
    check_replaceable(given.out / "grades.json", '"submissions"')
    try:
        given.out.mkdir(parents=True, exist_ok=True)  # before the work
    except OSError as error:
        raise InputError(f"cannot write into {given.out}: {error.strerror}") from error
    write(*grade(found, max(1, given.processes), given.seed), given.out)


# Reading submissions.


def submissions(paths: Iterable[Path]) -> dict[str, dict[str, str | Refused]]:
    """The files of each submission by its name. A folder is a submission, or holds one in each folder and zip."""
    found = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} is not there")
        if path.is_file() and not is_zip(path):
            raise InputError(f"{path} is neither a folder nor a zip")
        own = path.is_file() or any((path / place / file).is_file() for place in ("", "minipass") for file in FILES)
        inside = [] if own else sorted(each for each in path.iterdir() if each.is_dir() or is_zip(each))
        for each in [path] if own else inside:
            if (each / "grades.json").is_file():  # what an earlier run wrote
                continue
            name = each.stem if each.is_file() else each.resolve().name
            if name in found:
                raise InputError(f"two submissions are called {name}; rename one")
            found[name] = read(each)
    if not found:
        raise InputError("there is no submission: give folders or zips that hold minipass/decode.py and others")
    return found


def is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip"


def read(path: Path) -> dict[str, str | Refused]:
    """The files with exercises in a folder or zip, wherever the folder `minipass` lies in it."""
    try:
        if path.is_dir():
            texts = {each.relative_to(path).as_posix(): each for each in path.rglob("*.py") if each.is_file()}
            return {file: text(texts[name].stat().st_size, texts[name].read_bytes) for file, name in places(texts)}
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            return {file: text(sizes[name], lambda name=name: archive.read(name)) for file, name in places(sizes)}
    except Exception as error:  # a damaged zip raises what it likes, as zlib.error, and a password a RuntimeError
        return dict.fromkeys(FILES, Refused(f"{path.name} cannot be read: {error}"))


def places(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each file with exercises and where it is: best in a folder minipass, and as far out as possible."""
    for file in FILES:
        fitting = [name for name in names if f"/{name}".endswith(f"/{file}") and "__MACOSX" not in name]
        if fitting:
            yield file, min(fitting, key=lambda name: (f"/minipass/{file}" not in f"/{name}", name.count("/"), name))


def text(size: int, load) -> str | Refused:
    try:
        return load().decode("utf-8-sig") if size <= LARGEST_FILE else Refused("the file is too large")
    except UnicodeDecodeError:
        return Refused("the file is not UTF-8")


# Taking an exercise's functions out of a submission.


def install(number: int, files: dict[str, str | Refused]) -> None:
    """Puts a submission's functions of one exercise in the place of the package's own, in this process."""
    for file in dict.fromkeys(file for file, _ in EXERCISES[number].functions):
        names = [name for other, name in EXERCISES[number].functions if other == file]
        module, given = import_module(f"minipass.{file.removesuffix('.py')}"), files.get(file)
        if not isinstance(given, str):
            raise given or Refused(f"minipass/{file} was not handed in")
        for name, node in taken(file, names, given, (PACKAGE / file).read_text("utf-8")).items():
            owner, _, last = name.rpartition(".")
            made = vars(module) if name not in names and not owner else {}
            exec(compile(ast.Module([node], []), file, "exec"), vars(module), made)
            if name in names:
                attrgetter(name)(module).__code__ = made[last].__code__  # wherever it was imported to
            elif owner and not hasattr(getattr(module, owner), last):
                setattr(getattr(module, owner), last, *made.values())


# Grading.


def graders_of(number: int) -> list:
    """The graders of an exercise, in order."""
    graders = import_module("minipass.extras.course.test_exercises")
    marked = [(function, getattr(function, "pytestmark", ())) for function in vars(graders).values()]
    return [function for function, marks in marked if any(mark.name == f"exercise_{number}" for mark in marks)]


def points(grader) -> int:
    return grader.pytestmark[0].args[0]


def work(job: Job, seed: int, connection) -> None:
    """What a process does: sends why the exercise cannot be graded, or for each grader None, or what it says."""
    torch.set_num_threads(1)
    import_module("minipass.extras.course.test_exercises").SEED = seed
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            install(job.number, job.files)
        except BaseException as error:
            connection.send(str(error) if isinstance(error, Refused) else said(error))
            return
        connection.send(None)
        for grader in graders_of(job.number):
            try:
                grader()
                message = None
            except BaseException as error:  # an exit, too
                message = said(error)
            connection.send(message)


def said(error: BaseException) -> str:
    lines = str(error).splitlines()
    first = lines[0][:300] if lines else ""
    return first if isinstance(error, AssertionError) and first else f"{type(error).__name__}: {first}"


def run(
    jobs: Iterable[Job], seed: int, n_processes: int, seconds: dict[int, float]
) -> Iterator[tuple[Job, list[str | None], float]]:
    """Each job with what its graders said and the seconds it took, in the order in which they end.

    seconds: how long each exercise may take.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([__name__, "minipass.extras.course.test_exercises"])  # torch is imported once
    jobs, running = iter(jobs), {}
    while True:
        while len(running) < n_processes and (job := next(jobs, None)) is not None:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(job, seed, there), daemon=True)
            process.start()
            there.close()
            running[here] = job, process, [], time.monotonic() + seconds[job.number]
        if not running:
            return
        wait(list(running), max(0.0, min(end for *_, end in running.values()) - time.monotonic()))
        for connection, (job, process, messages, end) in list(running.items()):
            try:
                while connection.poll():
                    messages.append(connection.recv())
                late = time.monotonic() > end
            except (EOFError, OSError):  # it ended
                late = False
            else:
                if not late:
                    continue
            process.kill()
            process.join()
            connection.close()
            del running[connection]
            n_graders, failed = len(graders_of(job.number)), messages and messages[0]
            rest = failed or (
                f"no result after {seconds[job.number]:.0f} seconds: is there an endless loop?"
                if late
                else "the process ended"
            )
            messages = [] if failed else messages[1:]
            took = time.monotonic() - end + seconds[job.number]
            yield job, messages + [rest] * (n_graders - len(messages)), took


def grade(given: dict[str, dict], n_processes: int = 1, seed: int | None = None) -> tuple[dict[str, dict], int]:
    """For each submission and exercise the points and why others are lost, {student: {number: (points, reasons)}}, and
    the seed of the graders' numbers."""
    if find_spec("pytest") is None:
        raise InputError("the graders need pytest: pip install pytest")
    reference, fresh = {"": {file: (PACKAGE / file).read_text("utf-8") for file in FILES}}, seed is None
    for _ in range(5 if fresh else 1):
        seed, seconds, wrong = 1 + secrets.randbelow(10**6) if fresh else seed, {}, []
        for job, messages, took in run(jobs(reference), seed, n_processes, dict.fromkeys(EXERCISES, MOST_SECONDS)):
            seconds[job.number] = SLOWER * took + MORE_SECONDS
            wrong += [message for message in messages if message is not None]
        if not wrong:
            break  # else these numbers are bad luck
    else:
        raise InputError(f"the package's own code would lose points: {wrong[0]}")
    results = {student: {} for student in given}
    total = len(given) * len(EXERCISES)
    for job, messages, _ in tqdm(run(jobs(given), seed, n_processes, seconds), "grading", total, disable=None):
        graders = list(zip(graders_of(job.number), messages, strict=True))
        gained = sum(points(grader) for grader, message in graders if message is None)
        lost = dict.fromkeys(message for _, message in graders if message is not None)
        results[job.student][job.number] = gained, list(lost)
    return results, seed


def jobs(given: dict[str, dict]) -> Iterator[Job]:
    return (Job(student, number, files) for student, files in given.items() for number in EXERCISES)


# Writing.


def write(results: dict[str, dict], seed: int, folder: Path) -> None:
    """Prints the table, then writes grades.csv and grades.json."""
    rows = [[name, *(of[n][0] for n in EXERCISES), sum(gained for gained, _ in of.values())]
            for name, of in results.items()]  # fmt: skip
    head = ["submission", *(f"exercise {number}" for number in EXERCISES), "total"]
    best = ["out of", *(each.points for each in EXERCISES.values()), sum(each.points for each in EXERCISES.values())]
    details = {
        name: {"total": sum(gained for gained, _ in of.values())}
        | {f"exercise {n}": {"points": of[n][0], "of": EXERCISES[n].points, "messages": of[n][1]} for n in EXERCISES}
        for name, of in results.items()
    }
    width = max(len(str(row[0])) for row in [head, *rows])
    with heedless():
        for row in [["submission", *EXERCISES, "total"], best, *rows]:
            print(f"{row[0]:{width}}", *(f"{cell:>5}" for cell in row[1:]))
        if len(results) == 1:
            print(*(f"exercise {n}: {why}" for of in results.values() for n in EXERCISES for why in of[n][1]), sep="\n")

    def write_table(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([head, best, *rows])

    atomic_write(folder / "grades.csv", write_table)
    said = json.dumps({"seed": seed, "submissions": details}, indent=1) + "\n"
    atomic_write(folder / "grades.json", lambda path: path.write_text(said, "utf-8"))
    print(f"wrote {folder / 'grades.csv'} and {folder / 'grades.json'}, which says what was wrong")
