"""`python -m minipass.course`: the course's commands. What they do stands in minipass/extras/course."""

import sys

from minipass.cli import run_script
from minipass.extras.course import main

if __name__ == "__main__":
    sys.argv[0] = "minipass.course"  # what an error begins with
    run_script(main)
