"""`python submit.py` in a handout writes submission.zip: the files with exercises, to hand in."""

import ast
import zipfile
from pathlib import Path

FILES = "decode.py", "layout.py", "losses.py", "model.py", "sampling.py", "trees.py"  # in minipass/


def submit(folder: Path) -> list[str]:
    """Writes submission.zip into a handout's folder; returns what to tell the student."""
    target, told = folder / "submission.zip", []
    try:
        texts = {file: (folder / "minipass" / file).read_bytes() for file in FILES}
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in texts.items():
                archive.writestr(f"minipass/{file}", text)
    except OSError as error:
        raise SystemExit(f"submit: {error.filename}: {error.strerror}; run this in the handout's folder") from error
    for file, text in texts.items():
        try:
            ast.parse(text)
        except (SyntaxError, ValueError) as error:
            told.append(f"{file} cannot be read, its exercises would get no points: {error}")
    return [*told, f"wrote {target}; hand it in"]


if __name__ == "__main__":
    print("\n".join(submit(Path(__file__).parent)))
