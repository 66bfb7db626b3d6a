"""Slides for a lecture as one HTML page, from SLIDES.md: a screen each, and a page each when printed.

A slide ends with `---`. There are titles (`# `), points (`- `), formulas (four spaces), paragraphs, and the pictures of
minipass.extras.figures, drawn from the real masks.
"""

import base64
import html
import io
import re
from pathlib import Path

STYLE = """
html { font-size: min(2.3vw, 4.1vh); } body { margin: 0; font: 1rem/1.45 system-ui, sans-serif; counter-reset: slide; }
body { color: #222; background: white; } h1 { font-size: 1.5rem; color: #0072b2; margin-top: 0; } li { margin: .5em 0; }
section { box-sizing: border-box; min-height: 100vh; padding: 6vh 7vw; border-bottom: 1px solid #ccc; }
section { position: relative; counter-increment: slide; } section:after { content: counter(slide); font-size: .6rem; }
section:after { position: absolute; right: 2vw; bottom: 2vh; color: #888; } code, pre { background: #f2f2f2; }
code, pre { font-size: .85em; } pre { padding: .6em; }
img { float: right; width: 54%; max-height: 76vh; object-fit: contain; margin: 0 0 0 2vw; }
@page { size: 320mm 180mm; margin: 0; } @media print { section { height: 100vh; border: 0; break-after: page; } }
"""


def slides() -> str:
    """The page, pictures and all."""
    text = (Path(__file__).parent / "SLIDES.md").read_text("utf-8")
    sections = "\n".join(f"<section>\n{section(slide)}</section>" for slide in text.split("\n---\n"))
    head = f'<meta charset="utf-8">\n<title>Parallel speculative sampling</title>\n<style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{sections}\n</body>\n</html>\n'


def section(slide: str) -> str:
    out = []
    for block in re.split(r"\n\n+", slide.strip("\n")):
        lines = block.split("\n")
        if block.startswith("# "):
            out.append(f"<h1>{inline(block[2:])}</h1>")
        elif block.startswith("    "):
            out.append("<pre>" + html.escape("\n".join(line[4:] for line in lines)) + "</pre>")
        elif block.startswith("- "):
            points = re.split(r"\n?^- ", block, flags=re.M)[1:]
            out.append("<ul>" + "".join(f"<li>{inline(point)}</li>" for point in points) + "</ul>")
        elif picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", block, re.S):
            alt = html.escape(" ".join(picture[1].split()))
            out.append(f'<img alt="{alt}" src="data:image/png;base64,{png(picture[2])}">')
        else:
            out.append(f"<p>{inline(block)}</p>")
    return "\n".join(out) + "\n"


def inline(text: str) -> str:
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)


def png(name: str) -> str:
    """A picture of the masks, in base64."""
    from minipass.extras.figures import PICTURES, picture  # needs matplotlib

    file = io.BytesIO()
    picture(PICTURES[name]()).savefig(file, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return base64.b64encode(file.getvalue()).decode()
