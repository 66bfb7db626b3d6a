"""`python submit.py` in a handout writes submission.zip: the files with exercises, to hand in.

What graders take out of these files, and what they refuse, stands here too: a student hears it before handing in.
"""

import ast
import contextlib
import zipfile
from pathlib import Path

FILES = "decode.py", "layout.py", "losses.py", "model.py", "sampling.py", "trees.py"  # in minipass/
MODULES = "torch torch.nn torch.nn.functional numpy math itertools functools collections collections.abc typing".split()
NO_NAMES = "eval exec compile open globals locals vars getattr setattr delattr input breakpoint exit quit".split()
NO_ATTRIBUTES = (
    "sys os builtins gc inspect importlib ctypes library overrides testing load save hub tofile fromfile from_file "
    "memmap savetxt savez savez_compressed loadtxt genfromtxt fromregex open_memmap DataSource"
).split()
SET_ATTRIBUTES = "length", "pairs", "masks"  # what an exercise may set
KINDS = "staticmethod", "classmethod", "property"  # decorators that a helper keeps


class Refused(Exception):
    """Why code cannot be graded, for the student."""


def submit(folder: Path) -> list[str]:
    """Writes submission.zip into a handout's folder; returns what to tell the student."""
    target, told = folder / "submission.zip", []
    try:
        texts = {file: (folder / "minipass" / file).read_bytes() for file in FILES}
        blanks = {file: (folder / "tests" / "blank" / file).read_text("utf-8") for file in FILES}
    except OSError as error:
        raise SystemExit(f"submit: {error.filename}: {error.strerror}; run this in the handout's folder") from error
    half = target.with_suffix(".part")
    try:
        with zipfile.ZipFile(half, "w", zipfile.ZIP_DEFLATED) as archive:
            for file, text in texts.items():
                archive.writestr(f"minipass/{file}", text)
        half.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            half.unlink()
        raise SystemExit(f"submit: cannot write {target}: {error.strerror}") from error
    for file, blank in blanks.items():
        for name, node in functions(ast.parse(blank)).items():
            if "raise NotImplementedError('Exercise " in ast.unparse(node):
                try:
                    taken(file, [name], texts[file], blank)
                except Refused as error:
                    told.append(f"would get no points: {error}")
    return [*dict.fromkeys(told), f"wrote {target}; hand it in"]


def taken(file: str, names: list[str], text: str | bytes, package: str) -> dict[str, ast.stmt]:
    """What is taken out of a file that was handed in: helpers and imports, then the functions `names`, ready to run.

    package: the text of the package's own file; helpers have names that are not in it. Raises Refused.
    """
    tree, known = parse(file, text), helpers(ast.parse(package))
    own = {
        name.replace("._", ".own_"): node  # _names are refused, so a method _roll is called own_roll
        for name, node in helpers(tree).items()
        if name not in known and name.rpartition(".")[0] in ("", *known)
    }
    for part in ast.walk(tree):
        if isinstance(part, ast.Attribute) and part.attr[0] == "_" and any(n.endswith(f".own{part.attr}") for n in own):
            part.attr = f"own{part.attr}"
    found = functions(tree)
    missing = [name for name in names if name not in found]
    if missing:
        raise Refused(f"{file} has no function {missing[0]}")
    parts = {name: bare(found[name]) for name in names}
    wanted = list(parts.values())
    for node in wanted:  # grows by the helpers that are named in it
        check(node, file)
        named = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)}
        wanted += [each for name, each in own.items() if name.rpartition(".")[2] in named and each not in wanted]
    in_order = sorted(own.items(), key=lambda each: each[1].lineno)
    return {name: node for name, node in in_order if node in wanted} | parts


def parse(file: str, text: str | bytes) -> ast.Module:
    """The syntax tree of a file. Raises Refused, with the line, where it is no Python."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise Refused(f"{file}{f', line {line}' if line else ''}: {getattr(error, 'msg', error)}") from error


def functions(tree: ast.AST, prefix: str = "") -> dict[str, ast.FunctionDef]:
    """The functions of a module and the methods of its classes, by qualified name."""
    found = {}
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= functions(node, f"{prefix}{node.name}.")
    return found


def helpers(tree: ast.Module) -> dict[str, ast.stmt]:
    """What stands beside the exercises, by name: methods, and the statements that define a module's names."""
    found = {name: bare(node, helps=True) for name, node in functions(tree).items()}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for each in node.names:
                one = ast.copy_location(ast.Import([each]), node)
                if isinstance(node, ast.ImportFrom):
                    one = ast.copy_location(ast.ImportFrom(node.module, [each], node.level), node)
                found[(each.asname or each.name).split(".")[0]] = one
        elif isinstance(node, ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {each.id: node for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return found


def bare(node: ast.FunctionDef, helps: bool = False) -> ast.FunctionDef:
    """The function without what runs where it is defined: annotations, decorators, defaults (the package's stay)."""
    kept = KINDS if helps else ()
    node.decorator_list = [each for each in node.decorator_list if getattr(each, "id", None) in kept]
    node.returns, arguments = None, node.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    if not helps:
        arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
    return node


def check(node: ast.stmt, file: str) -> None:
    """Raises Refused where the code reaches for more than an exercise needs."""
    for part in ast.walk(node):
        what = None
        if isinstance(part, ast.Import | ast.ImportFrom):
            modules = [part.module or ""] if isinstance(part, ast.ImportFrom) else [each.name for each in part.names]
            ours = [f"minipass.{file.removesuffix('.py')}" for file in FILES]
            allowed = all(name in (*MODULES, *ours) for name in modules)
            if not allowed or any(each.name in ("*", *NO_ATTRIBUTES) for each in part.names):
                what = ast.unparse(part)
        elif isinstance(part, ast.Name) and (part.id in NO_NAMES or part.id.startswith("__")):
            what = part.id
        elif isinstance(part, ast.Attribute):
            hidden = part.attr.startswith("_") and part.attr not in ("_replace", "_asdict")
            if hidden or part.attr in NO_ATTRIBUTES:
                what = ast.unparse(part)
            elif not isinstance(part.ctx, ast.Load) and part.attr not in SET_ATTRIBUTES:
                what = f"to set {ast.unparse(part)}"
        elif isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value.startswith("__"):
            what = repr(part.value)
        elif isinstance(part, ast.ClassDef | ast.Global):
            what = "class" if isinstance(part, ast.ClassDef) else "global"
        if what:
            raise Refused(f"{file}, line {part.lineno}: the graders do not allow {what!r} in an exercise")


if __name__ == "__main__":
    print("\n".join(submit(Path(__file__).parent)))
