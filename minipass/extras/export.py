"""`python -m minipass.extras.export CHECKPOINT FOLDER` writes a checkpoint as a folder that Transformers opens."""

import argparse
import os
from pathlib import Path

from minipass import pretrained, weights
from minipass.cli import run_script
from minipass.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minipass.extras.export", description="Writes a checkpoint as a folder that Transformers opens."
    )
    parser.add_argument("checkpoint", help="a checkpoint, as in sample.py --checkpoint")
    parser.add_argument("folder", type=Path, help="the folder to write; it must not hold a model yet")
    args = parser.parse_args()
    written = pretrained.CONFIG, pretrained.WEIGHTS, weights.TABLE
    if any(os.path.exists(args.folder / name) for name in written):
        raise InputError(f"{args.folder} already holds a model: name another folder")
    loaded = weights.load(args.checkpoint)
    weights.save_pretrained(loaded.model, args.folder, loaded.record)
    n_lookahead, width = loaded.model.lookahead.shape
    table = f" and {weights.TABLE} ({n_lookahead} x {width})" if n_lookahead else ""
    print(f"wrote {args.folder}: {pretrained.CONFIG}, {pretrained.WEIGHTS}{table}; no tokenizer")


if __name__ == "__main__":
    run_script(main)
