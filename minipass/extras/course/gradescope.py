"""`python -m minipass.course gradescope FOLDER` writes FOLDER/autograder.zip, which Gradescope takes as it is.

Gradescope runs setup.sh once. For each submission it then unpacks the zip into /autograder/source, what was handed in
into /autograder/submission, runs run_autograder and reads /autograder/results/results.json.
"""

import json
import sys
import zipfile
from pathlib import Path

from minipass.extras.course import PACKAGE
from minipass.extras.course.grade import grade, read
from minipass.extras.course.grading import EXERCISES
from minipass.files import atomic_write

SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install "torch>=2.9,<2.14" --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install numpy "tiktoken>=0.9" regex tqdm pytest
"""
RUN = """#!/usr/bin/env bash
folder="${AUTOGRADER:-/autograder}" # another folder, and another python, to try it out
cd "$folder/source"
"${PYTHON:-/autograder/venv/bin/python}" -m minipass.extras.course.gradescope "$folder"
"""


def write_autograder(folder: Path) -> Path:
    """Writes autograder.zip: the package's sources and graders, setup.sh and run_autograder."""

    def write(file: Path) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
                info = zipfile.ZipInfo(name)
                info.external_attr = 0o100755 << 16  # may be executed
                archive.writestr(info, text)
            for path in sorted(PACKAGE.rglob("*.py")):
                archive.write(path, path.relative_to(PACKAGE.parent))

    target = folder / "autograder.zip"
    atomic_write(target, write)
    return target


def grade_one(folder: Path) -> None:
    """What run_autograder does: a score and what was wrong, for each exercise."""
    results = grade({"": read(folder / "submission")})[0][""]
    tests = [
        {
            "name": f"Exercise {number}: {exercise.title}",
            "score": results[number][0],
            "max_score": exercise.points,
            "output": "\n".join(results[number][1]),
        }
        for number, exercise in EXERCISES.items()
    ]
    (folder / "results" / "results.json").write_text(json.dumps({"tests": tests}, indent=1), "utf-8")


if __name__ == "__main__":
    grade_one(Path(sys.argv[1]))
