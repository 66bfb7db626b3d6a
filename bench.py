"""Measures PaSS against plain decoding: tokens/pass, acceptance by position and wall-clock time.

`python bench.py` measures the shipped joint model, greedy and sampled, in a few minutes; --full runs all experiments,
--only NAME... some of them. Prompts come from held-out files only. The tables on standard output are Markdown.
"""

import argparse
import json
import os
import platform
import re
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure

from minipass import graphs
from minipass.cli import choose_device, choose_dtype, dtype_name, run_script
from minipass.data import BUILT_IN
from minipass.errors import InputError
from minipass.extras.benchmark.experiments import DEFAULTS, EXPERIMENTS, overview
from minipass.extras.benchmark.subjects import Bench, heldout, load
from minipass.files import atomic_write, heedless


def parse_arguments() -> argparse.Namespace:
    questions = "\n".join(f"  {name}: {experiment.__doc__}" for name, experiment in EXPERIMENTS.items())
    description, shape = f"{__doc__}\nexperiments:\n{questions}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shape)
    add, which = parser.add_argument, parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="run all experiments that have what they need")
    which.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="run these (default: headline)")
    add("--checkpoint", default="joint", help="as in sample.py (default: %(default)s)")
    add("--draft-model", metavar="CHECKPOINT", help="drafts for two-model decoding (default: draft, if it fits)")
    add("--compare", nargs="+", default=[], metavar="RUN", help="acceptance, bases: checkpoints, or folders of runs")
    add("--data", help=f"a path, {', '.join(BUILT_IN)}: its held-out files give the prompts (default: python)")
    add("--lookahead", nargs="+", type=int, metavar="L", help="drafts in a chain (default: 2 4)")
    add("--prompts", type=int, help="number of prompts (default: each experiment's own)")
    add("--prompt-tokens", type=int, default=100, help="tokens of each prompt (default: %(default)s)")
    add("--new-tokens", type=int, help="tokens generated for each (default: each experiment's own)")
    add("--samples", type=int, default=200, help="quality: functions that each method completes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto)")
    add("--cuda-graphs", action="store_true", help="on CUDA, record the turns of all methods and replay them")
    add("--json", type=Path, metavar="PATH", help="add all figures to this file, after each experiment")
    add("--plots", type=Path, metavar="FOLDER", help="also draw pictures; with --json an overview of that file, too")
    args = parser.parse_args()
    for name, least in {"prompts": 1, "prompt_tokens": 1, "samples": 1, "new_tokens": 2, "seed": 0}.items():
        given = getattr(args, name)
        if given is not None and not least <= given < 2**62:  # 2 new tokens: the clock starts after the first
            raise InputError(f"--{name.replace('_', '-')} must lie in {least}..2**62 - 1, not {given}")
    return args


def prepare(args: argparse.Namespace) -> Bench:
    """Loads the checkpoints and checks that they fit together, before anything is measured. Raises InputError."""
    device = choose_device(args.device)
    place = device, choose_dtype(args.dtype, device)
    if args.cuda_graphs and not graphs.available(device):
        raise InputError(f"--cuda-graphs needs CUDA, and the device is {device}")
    subject, compared = load(args.checkpoint, *place), [load(name, *place) for name in args.compare]
    config, n_tokens = subject.model.config, args.prompt_tokens + (args.new_tokens or DEFAULTS["new_tokens"])
    if n_tokens > config.block_size:
        raise InputError(f"prompt and text, {n_tokens} tokens, exceed {subject.name}'s window of {config.block_size}")
    args.lookahead = args.lookahead or [n for n in (2, 4) if n <= config.n_lookahead] or [1]
    if not all(1 <= n <= config.n_lookahead for n in args.lookahead):
        raise InputError(f"--lookahead must lie in 1..{config.n_lookahead}, the look-ahead tokens of {subject.name}")
    if args.data:
        heldout(args.data)  # is it there?
    draft = load(args.draft_model or "draft", *place)
    same = draft.encoding.token_byte_values() == subject.encoding.token_byte_values()
    if not (same and draft.model.config.block_size >= config.block_size):
        if args.draft_model:
            raise InputError(f"{draft.name} has other tokens than {subject.name}, or a smaller window")
        draft = None
    return Bench(args, subject, draft, compared, place)


def setting(bench: Bench) -> str:
    """The machine and the settings of a run, in words."""
    (device, dtype), cpuinfo = bench.place, Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else [*names, platform.machine()][0]
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{dtype_name(dtype)}, seed {bench.options.seed}, commit {commit()}"
    )


def commit() -> str:
    """Short name of the commit that is checked out, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def read_results(path: Path | None) -> dict:
    """What earlier runs wrote there, by experiment; empty if no file is there. Raises InputError for another file."""
    try:
        found = json.loads(path.read_text()) if path and os.path.isfile(path) else {"experiments": {}}
        return {name: {**each} for name, each in {**found["experiments"]}.items()}  # a TypeError for another kind
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} exists already but not from this script: name another file with --json") from error


def main() -> None:
    args = parse_arguments()
    bench, results = prepare(args), read_results(args.json)
    where, whole = setting(bench), {name for name, found in results.items() if "unfinished" not in found}

    def write_results() -> None:
        if args.json:
            content = json.dumps({"experiments": results}, indent=1) + "\n"
            atomic_write(args.json, lambda path: path.write_text(content))

    def draw(name: str, figure: Figure | None) -> None:
        if args.plots and figure:
            png = {"format": "png", "dpi": 130, "metadata": {"Software": None}}
            atomic_write(args.plots / f"{name}.png", lambda path: figure.savefig(path, **png))

    write_results()  # before hours are spent: perhaps no file can be written there
    if args.plots:
        atomic_write(args.plots / "bench.txt", lambda path: path.write_text(f"{where}\n"))
    for name in EXPERIMENTS if args.full else args.only or ["headline"]:
        n_said = 0  # parts of the report; each is said as soon as it is there
        try:
            for report in EXPERIMENTS[name](bench):
                if name not in whole:  # that of an earlier run stays until this one is whole, too
                    results[name] = {"setting": where, "unfinished": True, **report.data}
                    write_results()
                with heedless() if args.json else nullcontext():
                    head = [] if n_said else [f"**{name}**: {EXPERIMENTS[name].__doc__}"]
                    print("\n\n".join([*head, *report.parts[n_said:], ""]), flush=True)
                n_said = len(report.parts)
        except InputError as error:
            if name not in whole:
                results.pop(name, None)
                write_results()
            if not args.full:
                raise
            print(f"**{name}** is left out: {error}\n", flush=True)
            continue
        results[name] = {"setting": where, **report.data}
        write_results()
        draw(name, report.picture)
        with heedless() if args.json else nullcontext():
            print(f"{where}\n", flush=True)
    draw("overview", overview(results))


if __name__ == "__main__":
    run_script(main)
