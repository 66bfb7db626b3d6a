"""`python -m minipass.extras.export CHECKPOINT FOLDER` writes a checkpoint as a folder that Transformers opens."""

import argparse
from pathlib import Path

from minipass import pretrained, weights
from minipass.cli import run_script


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minipass.extras.export", description="Writes a checkpoint as a folder that Transformers opens."
    )
    parser.add_argument("checkpoint", help="a checkpoint, as in sample.py --checkpoint")
    parser.add_argument("folder", type=Path, help="the folder to write")
    args = parser.parse_args()
    loaded = weights.load(args.checkpoint)
    weights.save_pretrained(loaded.model, args.folder, loaded.record)
    n_lookahead, width = loaded.model.lookahead.shape
    table = f" and {weights.TABLE} ({n_lookahead} x {width})" if n_lookahead else ""
    print(f"wrote {args.folder}: {pretrained.CONFIG}, {pretrained.WEIGHTS}{table}")


if __name__ == "__main__":
    run_script(main)
