"""The course under other names: solutions that are public do not run where names and orders of arguments are others.

A seed picks a name for each of NAMES, and an order for the parameters of REORDERED; all sources and texts change alike,
so that a variant is a package like this one, with its own handout, graders and key.
"""

import ast
import io
import random
import re
import tokenize

# Told from English by an underscore, a capital or their ending: changed wherever they stand.
IDENTIFIERS = {
    "Distribution": ("TokenLaw", "TokenOdds", "NextToken"),
    "Layout": ("RowPlan", "PassPlan", "RowTree"),
    "CACHE_END": ("NO_PARENT", "AFTER_CACHE", "TOP"),
    "probs": ("masses", "odds", "chances"),
    "group_rows": ("drafting_rows", "rows_ahead", "next_rows"),
    "for_host": ("numbers_home", "report_row", "numbers_out"),
    "by_rank": ("sibling_sets", "rank_sets", "tiers"),
    "with_groups": ("hang_groups", "grouped", "add_groups"),
    "copied_shape": ("shape_of_copies", "lookup_shape", "repeat_shape"),
    "copied_drafts": ("find_copies", "drafts_by_lookup", "repeats_found"),
    "stream_keys": ("seed_keys", "keys_of_seeds", "three_keys"),
    "TV_SCALE": ("TV_WEIGHT", "TV_FACTOR", "TV_NATS"),
    "rows_after_cuts": ("behind_cuts", "rows_of_groups", "select_rows"),
    "lookahead_loss": ("drafting_loss", "loss_by_position", "ahead_loss"),
    "per_row": ("of_rows", "text_rows", "each_row"),
    "draft_logits": ("ahead_logits", "group_logits", "p_logits"),
    "text_logits": ("own_logits", "real_logits", "model_logits"),
}
# Also English words: changed in code, between backticks, as a whole string, and before a shape: `pairs (B, ..)`.
WORDS = {
    "mix": ("scramble", "stir", "finalise"),
    "uniform": ("noise_at", "hashed_number", "noise_number"),
    "reject": ("probe", "try_draft", "one_trial"),
    "accept": ("descend", "walk_down", "follow_tree"),
    "visible": ("in_sight", "to_see", "is_seen"),
    "pairs": ("kv", "key_values", "stored_kv"),
    "elsewhere": ("off_path", "not_above", "aside"),
    "largest": ("biggest", "extreme", "upper_bounds"),
    "before": ("prior", "last_told", "predecessor"),
    "anchors": ("stems", "moorings", "pegs"),
}
REORDERED = "uniform", "reject", "accept", "with_groups", "rows_after_cuts", "lookahead_loss"
IN_TEXT = re.compile(r"`[^`\n]+`|\w+(?=:? \()")


class Variant:
    """What a seed makes of files. sources: the package's own, of which parameters are read."""

    def __init__(self, seed: int, sources: list[str]) -> None:
        numbers = random.Random(seed)
        self.identifiers = {name: numbers.choice(others) for name, others in IDENTIFIERS.items()}
        self.names = self.identifiers | {name: numbers.choice(others) for name, others in WORDS.items()}
        nodes = {
            node.name: node for text in sources for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
        }
        self.parameters = {name: [each.arg for each in nodes[name].args.args] for name in REORDERED if name in nodes}
        self.order = dict(self.parameters)
        for name, own in self.parameters.items():
            while self.order[name] == own:
                self.order[name] = numbers.sample(own, len(own))

    def file(self, name: str, text: str) -> tuple[str, str]:
        """A file's new path and text."""
        if name.endswith(".py"):
            text = self.rename_words(self.reorder(text))
        else:
            text = self.in_text(text)
        return rename(name, self.names), rename(text, self.identifiers)

    def reorder(self, source: str) -> str:
        """Parameters in their new order where they are defined, and by name where they are given."""
        lines = source.encode().splitlines(keepends=True)
        edits = []  # (line, from, to, bytes), in bytes, as the syntax tree counts
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name in self.order:
                given = {each.arg: each for each in node.args.args}
                if list(given) == self.parameters[node.name]:
                    for each, other in zip(given.values(), map(given.get, self.order[node.name]), strict=True):
                        part = lines[other.lineno - 1][other.col_offset : other.end_col_offset]
                        edits.append((each.lineno - 1, each.col_offset, each.end_col_offset, part))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.order:
                for parameter, each in zip(self.parameters[node.func.id], node.args, strict=False):
                    edits.append((each.lineno - 1, each.col_offset, each.col_offset, f"{parameter}=".encode()))
        for line, start, end, part in sorted(edits, reverse=True):
            lines[line] = lines[line][:start] + part + lines[line][end:]
        return b"".join(lines).decode()

    def rename_words(self, source: str) -> str:
        """Python's names, and what strings and comments say of them."""
        lines, edits = source.splitlines(keepends=True), []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME:
                new = self.names.get(token.string, token.string)
            elif token.type in (tokenize.STRING, tokenize.COMMENT):
                new = self.in_text(token.string)
                if token.string[0] in "fF":  # before Python 3.12 the code in it is no token of its own
                    new = re.sub(r"{[^{}]+}", lambda match: rename(match[0], self.names), new)
                if new[1:-1] in WORDS:
                    new = new[0] + self.names[new[1:-1]] + new[-1]
            else:
                continue
            if new != token.string:
                edits.append((token.start, token.end, new))
        for (line, start), (end_line, end), new in reversed(edits):
            lines[line - 1 : end_line] = [lines[line - 1][:start] + new + lines[end_line - 1][end:]]
        return "".join(lines)

    def in_text(self, text: str) -> str:
        return IN_TEXT.sub(lambda match: rename(match[0], self.names), text)


def rename(text: str, names: dict[str, str]) -> str:
    return re.sub(r"\b[A-Za-z_]+\b", lambda match: names.get(match[0], match[0]), text)
