"""Runs the commands of README, CONTRIBUTING and docs as written: `.venv/bin/python .ci/commands.py` in a fresh clone.

A command is a line of a block marked `sh`, or a whole block marked `python`. What takes longer is marked `sh long` and
left out, as are the lines that begin with `git clone`, which .ci/run executes itself. docs/tour.ipynb runs, too.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MOST_SECONDS = 300  # on a busy machine; on a quiet one each takes less than a minute
NOTEBOOK = Path("docs/tour.ipynb")
ENVIRONMENT = os.environ | {"PATH": f"{Path('.venv/bin').resolve()}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def commands(page: str) -> list[str]:
    """What the blocks of a Markdown page say, one command each."""
    found: list[str] = []
    for language, block in re.findall(r"^```(sh|python)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL):
        if language == "python":
            found.append(f"python -c {shlex.quote(block)}")
        else:
            found += [line for line in block.splitlines() if not line.startswith("git clone")]
    return found


def run(command: str) -> bool:
    """Whether the command succeeds, with nothing to read. What a failing one said is printed."""
    began = time.perf_counter()
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], env=ENVIRONMENT, timeout=MOST_SECONDS, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        failed, output = done.returncode != 0, done.stdout
    except subprocess.TimeoutExpired:
        failed, output = True, f"took more than {MOST_SECONDS} s\n"
    said = f"+ {command.splitlines()[0]}  # {time.perf_counter() - began:.0f} s\n{output if failed else ''}"
    print(said, end="", flush=True)
    return not failed


def main() -> None:
    pages = [Path("README.md"), Path("CONTRIBUTING.md"), *sorted(Path("docs").glob("*.md"))]
    wanted = dict.fromkeys(command for page in pages for command in commands(page.read_text("utf-8")))
    if NOTEBOOK.is_file():
        wanted |= {"pip install -q nbclient ipykernel": None, f"jupyter execute {NOTEBOOK}": None}
    first = [command for command in wanted if "pip install" in command]  # the others need what these install
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as several:
        right = [*map(run, first), *several.map(run, [command for command in wanted if command not in first])]
    if not all(right):
        sys.exit(f"{right.count(False)} of {len(right)} commands failed")


if __name__ == "__main__":
    main()
