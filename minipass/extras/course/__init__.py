"""The course: `python -m minipass.course FOLDER` writes a handout in which eleven exercises are to be written.
With `grade FOLDER...` it grades submissions (grade.py), `gradescope FOLDER` writes an autograder for Gradescope, `key
FOLDER` solutions, rubrics and slides, and `submit FOLDER` packs a submission, as a handout's submit.py does.

A handout is this package with the bodies of the exercises' functions taken out, their graders, a trained model, and
ASSIGNMENT.md. grading.py lists these functions; they are found in the syntax tree, so the code carries no marks.
"""

import argparse
import ast
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from minipass.errors import InputError
from minipass.extras.course.grading import EXERCISES, placeholder
from minipass.extras.course.slides import slides
from minipass.extras.course.submit import FILES, functions, submit
from minipass.extras.course.variant import Variant

COURSE = Path(__file__).parent
PACKAGE = COURSE.parents[1]
FOLDERS = (PACKAGE, PACKAGE / "extras", PACKAGE / "extras" / "benchmark")  # whose .py files are handed out
SCRIPTS = ("bench.py", "sample.py", "train_tiny.py")  # beside the package, where it comes from a clone
TRAINED = ("joint.pt", "smollm2.safetensors", "smollm2-table.safetensors")  # what is handed out
NOT_VARIED = (  # the names themselves, JavaScript
    "course/minipass/extras/course/variant.py",
    "course/minipass/extras/trace_page.py",
)
PYPROJECT = """[tool.pytest.ini_options]
pythonpath = ["."] # this folder's minipass, not one that is installed
testpaths = ["tests"]
addopts = "--tb=short -rN" # points alone at the end, not the list of what failed
markers = [
{markers}]
"""


def write_handout(folder: Path) -> None:
    write_new(folder, handout() | trained())


def write_key(folder: Path, seed: int | None = None) -> None:
    """Writes what is for teachers alone: solutions, rubrics, hours, mistakes that are often made, slides.

    seed: of a variant (variant.py), whose key is written then, and the package as it is in this variant.
    """
    files = {"TEACHER.md": (COURSE / "TEACHER.md").read_text("utf-8"), "slides.html": slides()}
    for number, exercise in EXERCISES.items():
        for file, name in exercise.functions:
            source = (PACKAGE / file).read_text("utf-8")
            code = ast.get_source_segment(source, functions(ast.parse(source))[name], padded=True)
            files[f"exercise_{number}/{name}.py"] = f"# minipass/{file}\n{textwrap.dedent(code)}\n"
    write_new(folder, files if seed is None else varied(files, seed))


def varied(key: dict[str, str], seed: int) -> dict[str, str | bytes]:
    """A variant's key, and in `course` the package as it is in this variant."""
    paths = (*PACKAGE.rglob("*.py"), *COURSE.glob("*.md"))
    package = {f"course/{path.relative_to(PACKAGE.parent).as_posix()}": path.read_text("utf-8") for path in paths}
    variant = Variant(seed, [text for name, text in package.items() if name.endswith(".py")])
    package |= {f"course/{name}": text for name, text in scripts().items()}
    files = dict(each if each[0] in NOT_VARIED else variant.file(*each) for each in (key | package).items())
    return files | {f"course/{name}": content for name, content in trained().items()}


def write_new(folder: Path, files: dict[str, str | bytes]) -> None:
    """Writes files by their paths. Raises InputError when `folder` has something in it or cannot be written."""
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder} is there already and not an empty folder; name a new one")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error


def trained() -> dict[str, bytes]:
    """Models, by their paths in a handout."""
    return {f"minipass/checkpoints/{name}": (PACKAGE / "checkpoints" / name).read_bytes() for name in TRAINED}


def scripts() -> dict[str, str]:
    paths = [PACKAGE.parent / name for name in SCRIPTS]
    return {path.name: path.read_text("utf-8") for path in paths if path.is_file()}


def handout(exercises: Iterable[int] = tuple(EXERCISES)) -> dict[str, str]:
    """The text of each file of a handout by its path; `exercises` are those to be written."""
    exercises = tuple(exercises)
    sources = sorted(path for folder in FOLDERS for path in folder.glob("*.py") if path.name != "course.py")
    files = {path.relative_to(PACKAGE.parent).as_posix(): with_gaps(path, exercises) for path in sources}
    files |= scripts()
    files["tests/conftest.py"] = (COURSE / "grading.py").read_text("utf-8").replace("minipass.extras.course.", "")
    for file in FILES:
        files[f"tests/blank/{file}"] = with_gaps(PACKAGE / file, EXERCISES)
    files["submit.py"] = (COURSE / "submit.py").read_text("utf-8")
    files["tests/test_exercises.py"] = (COURSE / "test_exercises.py").read_text("utf-8")
    files["ASSIGNMENT.md"] = (COURSE / "ASSIGNMENT.md").read_text("utf-8")
    markers = (f'    "exercise_{number}: {exercise.title}",\n' for number, exercise in EXERCISES.items())
    files["pyproject.toml"] = PYPROJECT.format(markers="".join(markers))
    return files


def with_gaps(path: Path, exercises: Iterable[int]) -> str:
    """The text of a file of the package, the bodies of the exercises' functions replaced by placeholders."""
    source = path.read_text("utf-8")
    lines, nodes = source.splitlines(keepends=True), functions(ast.parse(source))
    gaps = [
        (nodes[name], placeholder(number, name))
        for number in exercises
        for file, name in EXERCISES[number].functions
        if PACKAGE / file == path
    ]
    for node, statement in sorted(gaps, key=lambda gap: -gap[0].lineno):  # from below, so that line numbers stay true
        first, has_docstring = node.body[0], ast.get_docstring(node) is not None
        begin = first.end_lineno if has_docstring else first.lineno - 1  # all after a docstring goes, comments too
        lines[begin : node.end_lineno] = [f"{' ' * first.col_offset}{statement}\n"]
    return "".join(lines)


def main() -> None:
    command, *arguments = sys.argv[1:] or [""]
    if command == "grade":
        from minipass.extras.course import grade  # needs pytest, as writing a handout does not

        grade.main(arguments)
        return
    others = {"gradescope": "an autograder", "key": "solutions, rubrics and slides", "submit": "submission.zip"}
    if command in others:
        parser = argparse.ArgumentParser(
            prog=f"python -m minipass.course {command}", description=f"Writes {others[command]}."
        )
        if command == "submit":
            parser.add_argument("folder", type=Path, nargs="?", default=Path(), metavar="HANDOUT", help="default: here")
        else:
            parser.add_argument("folder", type=Path, metavar="FOLDER", help="where it is written")
        if command == "key":
            parser.add_argument("--variant", type=int, metavar="SEED", help="rename and reorder, so that public "
                                "solutions do not fit; the package so changed is written, too")  # fmt: skip
        given = parser.parse_args(arguments)
        if command == "gradescope":
            from minipass.extras.course.gradescope import write_autograder

            print(f"wrote {write_autograder(given.folder)}")
        elif command == "key":
            write_key(given.folder, given.variant)
            print(f"wrote solutions, rubrics and slides into {given.folder}; begin with TEACHER.md")
            if given.variant is not None:
                print(
                    f"this variant's handout, graders and autograder: the same commands, in {given.folder / 'course'}"
                )
        else:
            print("\n".join(submit(given.folder)))
        return
    parser = argparse.ArgumentParser(
        prog="python -m minipass.course",
        description="Writes a handout. Others: grade, gradescope, key and submit, each with --help.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new or empty folder")
    folder = parser.parse_args().folder
    write_handout(folder)
    print(f"wrote the handout into {folder}; begin with {folder / 'ASSIGNMENT.md'}")
