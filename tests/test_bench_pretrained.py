"""bench.py --only pretrained, on a small random Llama: every contender runs and writes what it may."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_pretrained import a_llama, llama_folder, trained_on

from minipass import weights
from minipass.cli import run_script
from minipass.data import read_documents
from minipass.extras.benchmark import contenders, peers
from minipass.extras.benchmark import pretrained as experiment

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench  # noqa: E402


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
    shutil.copy(weights.SHIPPED / "joint.pt", shipped)
    monkeypatch.setattr(weights, "SHIPPED", shipped)
    monkeypatch.setattr(experiment, "MODEL", folder)
    monkeypatch.setattr(experiment, "CODE", "tqdm")
    monkeypatch.setattr(experiment, "EVALUATED", 2)
    monkeypatch.setattr(experiment, "WINDOW", 32)
    some = Path(contenders.__file__).parent
    monkeypatch.setattr(contenders, "read_documents", lambda source: read_documents(
        some if source == "docstrings" else source))  # fmt: skip

    def call(*arguments) -> tuple[str, dict]:
        few = ["--prompts", "8", "--prompt-tokens", "20", "--new-tokens", "12", "--dtype", "float32", "--device", "cpu"]
        found = tmp_path / "found.json"
        argv = ["bench.py", "--only", "pretrained", *few, "--json", found, "--plots", tmp_path, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, argv)])
        run_script(bench.main)
        return capsys.readouterr().out, json.loads(found.read_text())["experiments"]["pretrained"]

    return call


def test_every_contender_runs_and_writes_what_plain_decoding_writes(run, tmp_path):
    torch.manual_seed(0)
    out, found = run()
    tables = {name: rows for name, rows in found.items() if isinstance(rows, list)}
    domains = ("tqdm", "docstrings", "chat", "repetitive")
    sampled = {f"{domain}, T = 0.8, top-k 10" for domain in ("tqdm", "chat")}
    assert set(tables) == {f"{domain}, greedy" for domain in domains} | sampled
    for name, rows in tables.items():
        methods = {row["method"] for row in rows}
        assert {"plain", "two-pass, table", "tree of 16", "auto + prompt lookup", "prompt lookup alone"} <= methods
        assert {"HF plain", "HF prompt lookup"} <= methods or not peers.installed()
        ours = [row for row in rows if not row["method"].startswith("HF") and "two-pass" not in row["method"]]
        coupled = [row for row in ours if "rejection" not in row["method"]]
        assert all(row["same_text"] == 1 for row in coupled), name  # in float32
    assert len(found["teacher_forced"]) == 4
    assert "base loss" in out
    assert (tmp_path / "pretrained.png").exists()


def test_without_the_model_it_says_so(run, monkeypatch, tmp_path):
    monkeypatch.setattr(experiment, "MODEL", tmp_path / "none.gguf")
    assert "Left out: there is no" in run()[0]


def test_without_adapters_it_says_so(run, tmp_path):
    for file in (tmp_path / "shipped").glob("*.safetensors"):
        file.unlink()
    assert "Left out: nothing in the package was trained for" in run()[0]
