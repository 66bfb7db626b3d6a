"""Grading a class: right solutions of all kinds get full points, wrong ones lose them once, and cheats gain nothing."""

import ast
import csv
import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from minipass.errors import InputError
from minipass.extras import course
from minipass.extras.course import grade, gradescope
from minipass.extras.course import test_exercises as graders
from minipass.extras.course.grading import EXERCISES
from minipass.extras.course.submit import FILES, submit

REAL = {file: (course.PACKAGE / file).read_text("utf-8") for file in grade.FILES}


def with_body(text: str, name: str, body: str) -> str:
    """The text of a file with another body for one function."""
    node = course.functions(ast.parse(text))[name]
    lines = text.splitlines(keepends=True)
    indent = " " * node.body[0].col_offset
    lines[node.body[0].lineno - 1 : node.end_lineno] = [f"{indent}{line}\n" for line in body.strip("\n").splitlines()]
    return "".join(lines)


def planted(file: str, right: str, wrong: str) -> dict[str, str]:
    """All files, with one change."""
    assert right in REAL[file], f"{file} changed: plant this anew"
    return REAL | {file: REAL[file].replace(right, wrong, 1)}


def outcomes(number: int, files: dict, seed: int = 1, seconds: float = 100.0) -> list[str | None]:
    """What the graders of one exercise say in a process of their own."""
    ((_, messages, _),) = grade.run([grade.Job("one", number, files)], seed, 1, {number: seconds})
    assert len(messages) == len(grade.graders_of(number))
    return messages


# Right solutions of other kinds.

RIGHT = {
    "top-p by sorting and putting back, float64 logits": (1, "sampling.py", "Sampling.distribution", """
        size = logits.shape[-1]
        order = logits.double().argsort(dim=-1, descending=True)
        weights = torch.gather(logits.double(), -1, order)
        if self.temperature == 0:
            probs = torch.ones_like(weights) if n == 1 else weights.softmax(-1)
            return Distribution(order[..., :n], probs[..., :n])
        keep = min(size, max(self.top_k or size, n))
        order, weights = order[..., :keep], weights[..., :keep]
        weights = ((weights - weights[..., :1]) / self.temperature).exp()
        probs = weights / weights.sum(-1, keepdim=True)
        if self.top_p is not None:
            before = torch.cat([torch.zeros_like(probs[..., :1]), probs.cumsum(-1)[..., :-1]], -1)
            probs = probs.masked_fill(before >= self.top_p, 0)
            probs = probs / probs.sum(-1, keepdim=True)
        return Distribution(order, probs)
        """),
    "greedy over all tokens": (1, "sampling.py", "Sampling.distribution", """
        values, tokens = logits.double().sort(-1, descending=True)
        size = logits.shape[-1]
        if self.temperature == 0:
            first = (torch.arange(size) == 0).double().expand(tokens.shape)
            return Distribution(tokens, first if n == 1 else values.softmax(-1))
        size = min(size, max(self.top_k or size, n))
        probs = ((values[..., :size] - values[..., :1]) / self.temperature).softmax(-1)
        if self.top_p is not None:
            probs = probs * (probs.cumsum(-1) - probs < self.top_p)
        return Distribution(tokens[..., :size], probs / probs.sum(-1, keepdim=True))
        """),
    "top-p row by row": (1, "sampling.py", "Sampling.distribution", """
        size = logits.shape[-1]
        keep = n if self.temperature == 0 else min(size, max(self.top_k or size, n))
        rows = []
        for row in logits.reshape(-1, size).double():
            values, tokens = row.topk(keep)
            if self.temperature == 0:
                probs = values.exp() / values.exp() if n == 1 else values.exp() / row.exp().sum()
            else:
                probs = torch.softmax((values - values[0]) / self.temperature, 0)
                if self.top_p is not None:
                    total = 0.0
                    for i in range(keep):
                        given, total = probs[i].clone(), total if i == 0 else total
                        probs[i] = given if total < self.top_p else 0.0
                        total += float(given)
                    probs = probs / probs.sum()
            rows.append((tokens, probs))
        shape = (*logits.shape[:-1], keep)
        tokens, probs = (torch.stack(each).view(shape) for each in zip(*rows))
        return Distribution(tokens, probs)
        """),
    "mask from powers of the parents' matrix": (2, "layout.py", "tree", """
        parents = np.array(parents, dtype=np.int64)
        parents = parents.reshape(-1, parents.shape[-1])
        n = parents.shape[1]
        for row in range(n):
            if (parents[:, row] < -1).any() or (parents[:, row] >= row).any():
                raise ValueError(row)
        seen = np.zeros((len(parents), n, n), dtype=bool)
        for b in range(len(parents)):
            for row in range(n):
                at = row
                while at != -1:
                    seen[b, row, at] = True
                    at = parents[b, at]
        visible = torch.tensor(seen)
        depth = visible.sum(2) - 1
        return Layout(visible, depth, torch.tensor(list(lookahead), dtype=torch.int64))
        """),
    "groups one by one": (2, "layout.py", "with_groups", """
        anchors = np.atleast_2d(np.array(anchors, dtype=np.int64))
        n_groups = anchors.shape[1]
        lengths = [int(n_lookahead)] * n_groups if np.ndim(n_lookahead) == 0 else [int(n) for n in n_lookahead]
        rows = []
        for of_text in anchors:
            row = [int(p) for p in parents]
            for anchor, length in zip(of_text, lengths):
                for i in range(length):
                    row.append(int(anchor) if i == 0 else len(row) - 1)
            rows.append(row)
        return tree(rows, [i for length in lengths for i in range(length)])
        """),
    "mask made anew each time": (3, "model.py", "KVCache.mask", """
        n_rows = layout.visible.shape[1]
        mask = torch.full((len(self.length), n_rows, self.max_len), -float("inf"), dtype=self.pairs.dtype)
        for b, length in enumerate(self.length.tolist()):
            mask[b, :, :length] = 0
            mask[b, :, length : length + n_rows].masked_fill_(layout.visible[b if len(layout.visible) > 1 else 0], 0)
        return mask
        """),
    "store text by text": (3, "model.py", "KVCache.store", """
        for b in range(len(slots)):
            self.pairs[layer, b].index_copy_(0, slots[b], pairs[b])
        return self.pairs[layer].clone()
        """),
    "gather text by text": (3, "model.py", "KVCache.gather", """
        for b, length in enumerate(self.length.tolist()):
            self.pairs[:, b, length : length + rows.shape[1]] = self.pairs[:, b, length + rows[b]].clone()
        """),
    "uniform by dividing": (4, "sampling.py", "uniform", """
        hashed = mix(mix(key.unsqueeze(-1) + token))
        return (((hashed >> 12) & ((1 << 52) - 1)).to(torch.float64) + 0.5) / (1 << 52)
        """),
    "one race at all temperatures": (4, "sampling.py", "Sampling.race", """
        time = -uniform(key, given.tokens).log() / given.probs
        order = time.argsort(-1) if self.temperature else torch.arange(time.shape[-1]).expand(time.shape)
        shares = (1 / time) / (1 / time).sum(-1, keepdim=True) if self.temperature else given.probs
        return Distribution(*(each.gather(-1, order[..., :n]) for each in (given.tokens, shares)))
        """),
    "Gumbel noise": (4, "sampling.py", "Sampling.race", """
        if self.temperature == 0:
            return Distribution(*(each[..., :n] for each in given))
        scores = given.probs.log() - (-uniform(key, given.tokens).log()).log()
        order = scores.argsort(-1, descending=True)[..., :n]
        return Distribution(given.tokens.gather(-1, order), scores.softmax(-1).gather(-1, order))
        """),
    "reject over the whole vocabulary": (5, "sampling.py", "reject", """
        size = p.shape[-1]
        sums = p.sum(-1, keepdim=True)
        p = torch.where(sums > 0, p / sums, p)
        dense = q.dense(size)
        one = torch.nn.functional.one_hot(draft, size).bool()
        p_d, q_d = p[one].view(draft.shape), dense[one].view(draft.shape)
        accepted = (p_d > 0) & (u < q_d / p_d)
        left = torch.relu(dense - p)
        total = left.sum(-1, keepdim=True)
        left = torch.where((total > 0) & (p_d > 0).unsqueeze(-1), left / total, dense)
        return accepted, left.gather(-1, q.tokens), p.masked_fill(one, 0)
        """),
    "acceptance node by node": (6, "trees.py", "accept", """
        n_batch, n_nodes = q.tokens.shape[:2]
        parents, rejects, text = nodes.parents.expand(n_batch, -1), drafts.p is not None, torch.arange(n_batch)
        reached = torch.zeros(n_batch, dtype=torch.int64)
        left = q.probs.clone()
        p = drafts.p.clone() if rejects else None
        drawn = None if rejects else sampling.draw(q, keys[TARGET])
        for node in range(1, n_nodes):
            parent, token = parents[:, node - 1], drafts.tokens[:, node - 1]
            here = reached == parent
            if rejects:
                parent = int(parent[0])
                u = uniform(keys[ACCEPTANCE, :, parent], token[:, None])
                each = Distribution(q.tokens[:, parent, None], left[:, parent, None])
                fits, after, p_after = reject(token[:, None], p[:, parent, None], each, u)
                left[:, parent] = after[:, 0]
                p[:, parent] = p_after[:, 0]
                fits = fits[:, 0]
            else:
                fits = token == drawn[text, parent]
            reached = torch.where(here & fits, torch.full_like(reached, node), reached)
        if rejects:
            drawn = sampling.draw(Distribution(q.tokens, left), keys[TARGET])
        return reached, drawn[text, reached]
        """),
    "keys text by text": (7, "decode.py", "Decoder.noise", """
        keys = torch.empty(3, len(self.start), depth + 1, dtype=torch.int64)
        for b in range(len(self.start)):
            place = int(self.start[b]) + int(self.cache.length[b]) + 1
            for d in range(depth + 1):
                keys[:, b, d] = mix(self.keys[:, b, 0] + (place + d))
        return keys
        """),
    "two half matrices": (8, "model.py", "DraftHead.forward", """
        n = hidden.shape[-1]
        left, right = self.c_fc.weight.split(n, 1)
        inner = F.linear(hidden, left) + F.linear(before, right, self.c_fc.bias)
        return self.c_proj(nn.GELU("tanh")(inner)).add(hidden)
        """),
    "the turn, always gathering": (9, "decode.py", "Decoder.turn", """
        keys = self.noise(max(shape.tree.depth))
        nodes, drafts = self.draft(shape, handed, keys, copied)
        tokens = torch.cat((handed.root.unsqueeze(1), drafts.tokens), 1)
        hidden = self.model.hidden(tokens, nodes.layout, self.cache)
        logits = self.model.logits(hidden)
        q = self.sampling.distribution(logits[:, : tokens.shape[1]])
        n_texts, one = len(tokens), torch.arange(len(tokens))
        depth, kept, path = (t.expand(n_texts, *t.shape[1:]) for t in (nodes.depth, nodes.kept, nodes.path))
        last, root = accept(nodes, drafts, q, self.sampling, keys[:, one[:, None], depth])
        n, way = depth[one, last], path[one, last]
        self.cache.gather(way)
        self.cache.length = torch.where(self.active, self.cache.length + 1 + n, self.cache.length)
        rows = nodes.group_rows[last]
        ahead = torch.stack([hidden[b, rows[b]] for b in range(len(last))])
        logits = logits[one[:, None], rows] if self.scores_candidates else logits[:, :0]
        handed = Handed(root, tokens[one, last], ahead, logits)
        told = torch.stack([n, kept[one, last], root], 1)
        told = torch.cat([told, torch.gather(tokens, 1, way)[:, 1:]], 1)
        return Result(drafts, q, kept[one, last], handed, told, kept)
        """),
    "Algorithm 1 as a loop": (10, "decode.py", "TwoPass.schedule", """
        while True:
            yield Shape(n_lookahead=self.n_lookahead), None
            yield Shape(chain(self.n_lookahead)), None
        """),
    "rows after cuts by slices": (11, "losses.py", "rows_after_cuts", """
        groups = [per_row[b, cut + 1 : cut + 1 + n_lookahead] for b, of_text in enumerate(cuts) for cut in of_text]
        return torch.stack(groups).unflatten(0, cuts.shape)
        """),
    "F.kl_div": (11, "losses.py", "lookahead_loss", """
        n = draft_logits.shape[2]
        log_p = draft_logits.to(torch.float32).log_softmax(-1)
        if kind == "ce":
            token = rows_after_cuts(targets, cuts, n)
            loss = F.cross_entropy(log_p.flatten(0, 2), token.flatten(), reduction="none").view(token.shape)
        else:
            log_q = rows_after_cuts(text_logits, cuts, n).detach().to(torch.float32).log_softmax(-1)
            if kind == "kl":
                loss = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            else:
                loss = TV_SCALE * (1 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1))
        return loss.flatten(0, 1).mean(0)
        """),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_solution_of_another_kind_gets_full_points(name):
    number, file, function, body = RIGHT[name]
    files = REAL | {file: with_body(REAL[file], function, textwrap.dedent(body))}
    assert not any(outcomes(number, files, seed=7)), "a fresh seed, too"


def test_helpers_and_imports_beside_an_exercise_are_taken_and_nothing_else_runs():
    text = REAL["sampling.py"]
    for right, wrong in (
        ("    total = residual", "    residual = FF.relu(half(residual))\n    total = residual"),
        ("def reject(\n    draft: torch.Tensor", "@sys.exit\ndef reject(\n    draft: sys.exit()"),
        ("@sys.exit", "import torch.nn.functional as FF\nTWO = 2\ndef half(x, by=TWO): return x / by\n@sys.exit"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    text += "\nimport sys\nsys.exit()\ndef mix(x): return 0 * x\nclass Distribution: pass\n"
    assert not any(outcomes(5, REAL | {"sampling.py": text}))


def test_new_methods_are_taken_too_and_nothing_of_others_is_reached_by_their_names():
    root = "(self.start + self.cache.length)[:, None]"
    methods = """
    def _root(self, more=(0, 1)):
        return self._place[:, None] + more[0]

    @property
    def _place(self) -> "no one asks":
        return self.same(self.start) + self.cache.length

    @staticmethod
    def same(x):
        return x

"""
    text = REAL["decode.py"].replace("    def noise(", f"{methods}    def noise(").replace(root, "self._root()")
    assert not any(outcomes(7, REAL | {"decode.py": text}))
    text = text.replace("_root", "_C").replace("self._C()", f"{root} + 0 * len(str(torch._C))")
    assert "AttributeError: module 'torch' has no attribute 'own_C'" in outcomes(7, REAL | {"decode.py": text})


# Each mistake once.


def test_a_mistake_is_paid_in_its_own_exercise_alone():
    files = planted("layout.py", "np.count_nonzero(visible, axis=-1) - 1", "np.count_nonzero(visible, axis=-1)")
    assert any(outcomes(2, files))
    assert not any(outcomes(11, files))  # which needs exercise 2


def test_a_syntax_error_an_exit_or_an_endless_loop_costs_its_exercise():
    broken = planted("sampling.py", "def reject(", "def reject((")
    line = 1 + REAL["sampling.py"].split("def reject(")[0].count("\n")
    said = {f"sampling.py, line {line}: '(' was never closed"}
    assert set(outcomes(5, broken)) == set(outcomes(1, broken)) == said
    assert not any(outcomes(2, broken))
    body = "    p = p / p.sum(-1, keepdim=True)"
    loop = planted("sampling.py", body, f"    while True:\n        pass\n{body}")
    assert set(outcomes(5, loop, seconds=2)) == {"no result after 2 seconds: is there an endless loop?"}
    assert all(outcomes(5, planted("sampling.py", body, f"    raise SystemExit(0)\n{body}")))


CHEATS = {
    "exit": "torch.sys.exit()",
    "exit at once": "import os\n    os._exit(0)",
    "a patched comparison": "torch.equal = torch.allclose = lambda *_, **__: True",
    "a patched comparison by setattr": "setattr(torch, 'equal', lambda *_: True)",
    "a patched grader": "import minipass.extras.course.test_exercises as graders\n    graders.close = lambda *_: True",
    "a fake reference": "Distribution.dense = lambda self, n: self.probs",
    "a patched module": "torch.__dict__['equal'] = lambda *_: True",
    "a module by its name": "__import__('sys').exit()",
    "an object that equals all": "class Same:\n        def __eq__(self, _): return True\n    return (Same(),) * 3",
    "a kernel of one's own": "torch.library.Library('aten', 'IMPL').impl('equal', lambda *_: True, 'CPU')",
    "pytest": "import pytest\n    pytest.skip()",
    "the caller": "(_ for _ in ()).gi_frame.f_back.f_globals['close'] = lambda *_: True",
    "seeds": "torch.manual_seed(0)\n    u = torch.rand_like(u)",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gains_nothing(name):
    body = "    p = p / p.sum(-1, keepdim=True)"
    wrong = planted("sampling.py", "u * p_draft < q_draft", "u < 2")
    text = wrong["sampling.py"].replace(body, f"    {CHEATS[name]}\n{body}")
    gained = [message is None for message in outcomes(5, wrong | {"sampling.py": text})]
    honest = [message is None for message in outcomes(5, wrong)]
    assert all(had or not has for had, has in zip(honest, gained, strict=True))
    assert not all(honest)


def test_answers_known_by_heart_are_of_no_use():
    seen = float(graders.dense_case()[0][0, 0, 0])  # with seed 0, that of a handout
    files = planted("sampling.py", "u * p_draft < q_draft",
                    f"(u if abs(p[0, 0, 0] - {seen!r}) < 1e-9 else 0) * p_draft < q_draft")  # fmt: skip
    assert outcomes(5, files, seed=0)[0] is None
    assert outcomes(5, files, seed=3)[0] is not None


# Submissions, and the command.


def zipped(path: Path, files: dict[str, str], place: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(place + name, text)
    return path


def test_submissions_are_folders_or_zips_wherever_the_files_lie_in_them(tmp_path):
    zipped(tmp_path / "ann.zip", REAL, "minipass/")
    zipped(
        tmp_path / "bob.zip", REAL | {"__MACOSX/minipass/decode.py": "x", "tests/decode.py": "y"}, "handout/minipass/"
    )
    zipped(tmp_path / "cat.zip", REAL, "")
    (tmp_path / "dan" / "handout" / "minipass").mkdir(parents=True)
    for file, text in REAL.items():
        (tmp_path / "dan" / "handout" / "minipass" / file).write_text(text, "utf-8")
    found = grade.submissions([tmp_path])
    assert found == dict.fromkeys(("ann", "bob", "cat", "dan"), REAL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "grades.json").touch()
    assert grade.submissions([tmp_path]) == found
    assert grade.submissions([tmp_path / "ann.zip", tmp_path / "dan" / "handout"]) == {"ann": REAL, "handout": REAL}
    for bad in ([tmp_path / "ann.zip"] * 2, [tmp_path / "eve"], [tmp_path / "dan" / "handout" / "minipass" / "no"]):
        with pytest.raises(InputError):
            grade.submissions(bad)


def test_what_cannot_be_read_costs_its_exercises_and_says_why(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    zipped(tmp_path / "b.zip", {"layout.py": "# " + "x" * grade.LARGEST_FILE}, "")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("layout.py", b"\xff")
    zipped(tmp_path / "d.zip", {"decode.py": "def fused(): pass"}, "")
    torn = bytearray((tmp_path / "d.zip").read_bytes())
    torn[45] ^= 0xFF  # in the compressed data
    (tmp_path / "e.ZIP").write_bytes(torn)
    assert set(grade.submissions([tmp_path])) == {*"abcde"}
    (files,) = grade.submissions([tmp_path / "e.ZIP"]).values()
    with pytest.raises(grade.Refused, match="cannot be read"):
        grade.install(2, files)
    for name, said in ("a", "cannot be read"), ("b", "too large"), ("c", "not UTF-8"), ("d", "was not handed in"):
        (files,) = grade.submissions([tmp_path / f"{name}.zip"]).values()
        with pytest.raises(grade.Refused, match=said):
            grade.install(2, files)
    with pytest.raises(grade.Refused, match="no function TwoPass.schedule"):
        grade.install(10, files)


def test_a_students_zip_is_what_is_graded(tmp_path):
    course.write_new(tmp_path / "handout", course.handout())
    for file, text in REAL.items():
        (tmp_path / "handout" / "minipass" / file).write_text(text, "utf-8")
    run = subprocess.run([sys.executable, "submit.py"], cwd=tmp_path / "handout", capture_output=True, text=True)
    assert run.stdout.endswith("submission.zip; hand it in\n")
    assert grade.submissions([tmp_path / "handout" / "submission.zip"]) == {"submission": REAL}
    (tmp_path / "handout" / "minipass" / "trees.py").write_text("def (")
    assert submit(tmp_path / "handout")[0].startswith("would get no points: trees.py, line 1: ")
    refused = planted("layout.py", "    parents = np.atleast_2d", "    self.calls = 1\n    parents = np.atleast_2d")
    (tmp_path / "handout" / "minipass" / "layout.py").write_text(refused["layout.py"])
    assert "the graders do not allow 'to set self.calls' in an exercise" in submit(tmp_path / "handout")[0]
    assert sorted(FILES) == grade.FILES
    with pytest.raises(SystemExit, match="run this in the handout's folder"):
        submit(tmp_path)


def test_the_command_writes_a_table_a_csv_and_a_json(tmp_path, monkeypatch, capsys):
    few = {number: EXERCISES[number] for number in (2, 10)}
    monkeypatch.setattr(grade, "EXERCISES", few)
    zipped(tmp_path / "right.zip", REAL, "minipass/")
    zipped(tmp_path / "wrong.zip", planted("decode.py", "ahead = shape", "ahead = depth or shape"), "minipass/")
    grade.main([str(tmp_path), "--out", str(tmp_path / "out"), "--processes", "1"])
    rows = list(csv.reader((tmp_path / "out" / "grades.csv").open(encoding="utf-8")))
    assert rows[0] == ["submission", "exercise 2", "exercise 10", "total"]
    assert rows[1:] == [["out of", "10", "6", "16"], ["right", "10", "6", "16"], ["wrong", "10", "5", "15"]]
    details = json.loads((tmp_path / "out" / "grades.json").read_text("utf-8"))["submissions"]
    assert details["right"]["exercise 10"] == {"points": 6, "of": 6, "messages": []}
    (message,) = details["wrong"]["exercise 10"]["messages"]
    assert message == "after a turn that did not look ahead there are no drafts"
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:4]] == ["16", "16", "15"]


def test_names_and_messages_that_no_file_can_hold_cost_nobody_the_grades(tmp_path, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "utf-8", "backslashreplace", write_through=True))
    results = {"M\udcfcller": {n: (0, ["\ud800"]) for n in EXERCISES}, "Anna": {n: (1, []) for n in EXERCISES}}
    grade.write(results, 5, tmp_path)
    assert json.loads((tmp_path / "grades.json").read_text("utf-8"))["submissions"]["Anna"]["total"] == len(EXERCISES)
    _, _, *rows = csv.reader((tmp_path / "grades.csv").open(encoding="utf-8"))
    assert [row[0] for row in rows] == ["M\\udcfcller", "Anna"]
    out.seek(0)
    out.truncate()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "grades.csv").mkdir()  # cannot be written
    with pytest.raises(InputError, match="cannot write"):
        grade.write({"Anna": results["Anna"]}, 5, tmp_path / "full")
    assert b"Anna" in out.getvalue(), "the table comes first"


def test_the_autograder_for_gradescope_runs_in_a_clean_folder(tmp_path):
    with zipfile.ZipFile(gradescope.write_autograder(tmp_path)) as archive:
        archive.extractall(tmp_path / "source")
        assert all(archive.getinfo(name).external_attr >> 16 & 0o111 for name in ("setup.sh", "run_autograder"))
    (tmp_path / "results").mkdir()
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / "layout.py").write_text(REAL["layout.py"], "utf-8")  # only exercise 2
    subprocess.run(
        ["bash", tmp_path / "source" / "run_autograder"], cwd=tmp_path, check=True,
        env=os.environ | {"AUTOGRADER": str(tmp_path), "PYTHON": sys.executable},
    )  # fmt: skip
    tests = json.loads((tmp_path / "results" / "results.json").read_text("utf-8"))["tests"]
    assert [test["max_score"] for test in tests] == [exercise.points for exercise in EXERCISES.values()]
    assert [test["score"] for test in tests] == [0, 10, *[0] * 9]
    assert tests[1]["output"] == "" and tests[8]["output"] == "minipass/decode.py was not handed in"


def test_grades_take_no_other_files_place_and_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no submission")
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        grade.main([str(tmp_path / "notes.txt"), "--out", str(tmp_path)])
    (tmp_path / "a" / "minipass").mkdir(parents=True)
    (tmp_path / "a" / "minipass" / "decode.py").write_text("")
    (tmp_path / "grades.csv").write_text("my own list\n")
    with pytest.raises(InputError, match="exists already"):
        grade.main([str(tmp_path / "a"), "--out", str(tmp_path)])
    assert (tmp_path / "grades.csv").read_text() == "my own list\n"
