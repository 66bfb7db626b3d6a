"""bench.py --only pretrained uses, on a small random Llama: every contender runs and writes what it may."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import tqdm
from test_pretrained import a_llama, llama_folder, trained_on

from minipass import weights
from minipass.cli import run_script
from minipass.data import read_documents
from minipass.extras.benchmark import contenders, experiments, subjects

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench  # noqa: E402

pytest.importorskip("transformers")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    model = a_llama(block_size=400)
    shipped = tmp_path / "shipped"
    trained = trained_on(model, n_lookahead=4)
    folder = llama_folder(tmp_path / "llama", model)
    weights.save_adapters(trained, shipped / "llama.safetensors")
    trained.new_draft_head(0)
    trained.new_adapters(0)
    weights.save_adapters(trained, shipped / "llama-table.safetensors")
    shutil.copy(weights.SHIPPED / "draft.pt", shipped)
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    monkeypatch.setattr(contenders, "REPEATS", 2)
    monkeypatch.setattr(contenders, "READ", 2**10)
    monkeypatch.setattr(subjects, "WINDOW", 32)
    monkeypatch.setattr(subjects, "MOST_WINDOWS", 2)
    code, some = str(Path(tqdm.__file__).parent), Path(subjects.__file__).parent
    monkeypatch.setattr(subjects, "read_documents", lambda source: read_documents(
        some if source == "docstrings" else code if source == experiments.UNSEEN else source))  # fmt: skip

    def call(*arguments) -> tuple[str, dict]:
        few = "--prompts 2 --prompt-tokens 20 --new-tokens 12 --dtype float32 --device cpu".split()
        found = tmp_path / "found.json"
        argv = ["bench.py", "--only", "pretrained", "uses", "--checkpoint", folder, *few, "--json", found, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        run_script(bench.main)
        return capsys.readouterr().out, json.loads(found.read_text())["experiments"]

    return call


def test_every_contender_runs_and_writes_what_plain_decoding_writes(run, tmp_path):
    torch.manual_seed(0)
    out, found = run("--plots", tmp_path)
    races: dict[tuple, dict] = {}
    for row in [*found["pretrained"]["rows"], *found["uses"]["rows"]]:
        races.setdefault((row["text"], row["decoding"]), {})[row["method"]] = row
    code = os.path.basename(experiments.UNSEEN)
    texts = (code, subjects.PROSE, subjects.CHAT, subjects.EDIT, subjects.SUMMARY)
    assert set(races) == {(text, "greedy") for text in texts} | {
        (text, contenders.SAMPLED) for text in (code, subjects.CHAT)
    }
    assert {"two-pass, table", "fused, table", "tree of 16, table"} <= set(races[code, "greedy"])
    assert {"fused, L = 4", "tree of 16"} <= set(races[code, "greedy"])
    for (_, decoding), rows in races.items():
        assert {"plain", "fused, L = 1", "auto", "auto + prompt lookup", "prompt lookup alone"} <= set(rows)
        assert {"HF plain", "HF prompt lookup"} <= set(rows)
        for name, row in rows.items():
            if decoding == "greedy" or not ("rejection" in name or "HF" in name):
                assert row["same_text"] == 1, (decoding, name)  # in float32
    assert len(found["pretrained"]["teacher_forced"]) == 4
    assert [row["rows"] for row in found["pretrained"]["turns"]] == [1, 4, 9, 25]
    assert "constant acceptance" in out
    assert (tmp_path / "pretrained.png").exists()


def test_without_adapters_it_says_so(run, tmp_path, capsys):
    for file in (tmp_path / "shipped").glob("*-table.safetensors"):
        file.unlink()
    with pytest.raises(SystemExit):
        run()
    assert "nothing in the package was trained for" in capsys.readouterr().err


def test_without_the_model_it_says_so(run, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "SMOLLM2", "no-such-model")
    monkeypatch.setattr(experiments, "is_pretrained", lambda name: False)
    with pytest.raises(SystemExit):
        run()
    assert "there is no checkpoint no-such-model" in capsys.readouterr().err
