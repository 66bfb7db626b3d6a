"""Measures what PaSS gives: tokens/pass, acceptance by position and wall clock against plain decoding.

`python bench.py` measures the shipped joint model, greedy and sampled, in a few minutes; --full runs all experiments,
--only NAME ... some. Prompts come from held-out files only. The tables on standard output are Markdown.
"""

import argparse
import json
import os
import platform
import subprocess
from contextlib import nullcontext
from pathlib import Path

import torch

from minipass import graphs, weights
from minipass.cli import choose_device, choose_dtype, run_script
from minipass.data import BUILT_IN
from minipass.errors import InputError
from minipass.extras.benchmark.contenders import Bench, Subject
from minipass.extras.benchmark.experiments import EXPERIMENTS
from minipass.extras.benchmark.reporting import Report
from minipass.files import atomic_write, heedless

DEFAULT_LENGTHS = (2, 4)
LEAST_NEW_TOKENS = 2  # the clock starts after the first


def parse_arguments() -> argparse.Namespace:
    questions = "\n".join(f"  {name}: {run.__doc__.splitlines()[0]}" for name, run in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + "\nexperiments:\n" + questions, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="run all experiments")
    which.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="run these (default: headline)")
    add("--checkpoint", default="joint", help="a file, or the name of one in the package (default: %(default)s)")
    add(
        "--frozen", metavar="CHECKPOINT", help="the paper's kind: a base with a trained table (default: frozen, if any)"
    )
    add("--draft-model", metavar="CHECKPOINT", help="drafts for two-model decoding (default: draft, if any)")
    add("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="acceptance: more checkpoints, or folders "
        "of training runs")  # fmt: skip
    add("--data", default="python", help=f"{', '.join(BUILT_IN)} or a path: the corpus whose held-out files give the "
        "prompts (default: %(default)s)")  # fmt: skip
    add("--lookahead", nargs="+", type=int, metavar="L", help="drafts in a row (default: 2 4)")
    add("--prompts", type=int, default=48, help="number of prompts (default: %(default)s)")
    add("--prompt-tokens", type=int, default=100, help="tokens of each prompt (default: %(default)s)")
    add("--new-tokens", type=int, default=120, help="tokens generated for each (default: %(default)s)")
    add("--samples", type=int, default=800, help="quality: functions for each method (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64 (default: auto)")
    add(
        "--cuda-graphs", action="store_true", help="on CUDA: record the turns of all methods as graphs, and replay them"
    )
    add("--compile", action="store_true", dest="cuda_graphs", help=argparse.SUPPRESS)  # its old name
    add("--json", type=Path, metavar="PATH", help="also write all figures there, after each experiment; those of other "
        "experiments that are there stay")  # fmt: skip
    add("--plots", type=Path, metavar="FOLDER", help="also draw pictures into it")
    args = parser.parse_args()
    for name, least in {"prompts": 1, "prompt_tokens": 1, "samples": 1, "new_tokens": LEAST_NEW_TOKENS}.items():
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed must lie in 0..2**63 - 1, not {args.seed}")
    return args


def prepare(args: argparse.Namespace) -> Bench:
    """Loads the checkpoints and sees that they fit together, before anything is measured."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    if args.cuda_graphs and not graphs.available(device):
        raise InputError(f"--cuda-graphs needs CUDA, and the device is {device}")

    def load(name: str) -> Subject:
        return Subject(name, weights.load(name, device=device, dtype=dtype))

    def load_other(given: str | None, shipped: str, same_tokens: bool) -> Subject | None:
        """The one given, which must fit the subject, or the one in the package if it is there and fits."""
        if given is None and not (weights.SHIPPED / f"{shipped}.pt").is_file():
            return None
        other = load(given or shipped)
        problem = misfit(other)
        if same_tokens and other.loaded.encoding.token_byte_values() != subject.loaded.encoding.token_byte_values():
            problem = f"{other.name} has other tokens than {subject.name}"
        if problem and given:
            raise InputError(problem)
        return None if problem else other

    def misfit(other: Subject) -> str | None:
        """What keeps a checkpoint from generating as much as asked, if anything does."""
        if args.prompt_tokens + args.new_tokens <= other.model.config.block_size:
            return None
        return (
            f"{args.prompt_tokens} prompt tokens and {args.new_tokens} new ones do not fit into the context window of "
            f"{other.name}, {other.model.config.block_size} tokens"
        )

    subject = load(args.checkpoint)
    if problem := misfit(subject):
        raise InputError(problem)
    most = subject.model.config.n_lookahead
    if most == 0:
        raise InputError(f"{subject.name} has no look-ahead tokens to draft with")
    lengths = args.lookahead or [length for length in DEFAULT_LENGTHS if length <= most] or [most]
    for length in lengths:
        if not 1 <= length <= most:
            raise InputError(f"--lookahead must lie in 1..{most}, what {subject.name} has, not {length}")
    files = [path / "model.pt" if os.path.isdir(path) else path for path in args.compare]
    return Bench(
        subject=subject,
        frozen=load_other(args.frozen, "frozen", same_tokens=False),
        draft=load_other(args.draft_model, "draft", same_tokens=True),
        compared=[
            (Subject(str(path), load(str(file)).loaded), file.parent / "log.jsonl")
            for path, file in zip(args.compare, files, strict=True)
        ],
        device=device,
        dtype=dtype,
        data=args.data,
        lookahead=lengths,
        n_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        n_samples=args.samples,
        seed=args.seed,
        use_graphs=args.cuda_graphs,
    )


def setting(bench: Bench) -> str:
    """Where and how a run was made, in words."""
    name = platform.processor() or platform.machine()
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name(bench.device)
    elif Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    return (
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{str(bench.dtype).removeprefix('torch.')}, seed {bench.seed}, commit {commit()}"
    )


def commit() -> str:
    """Short name of the commit that is checked out, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_results(path: Path) -> dict:
    """What an earlier run wrote there, or nothing. Raises InputError for a file of another kind."""
    try:
        found = json.loads(path.read_text())
        if set(found) != {"experiments"} or not isinstance(found["experiments"], dict):
            raise ValueError
    except FileNotFoundError:
        return {"experiments": {}}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is there already and not a file of this script: name another with --json") from error
    return found


def write_results(path: Path, results: dict) -> None:
    """Atomically, an interrupt leaves what was measured before."""
    content = json.dumps(results, indent=1) + "\n"
    atomic_write(path, lambda temporary: temporary.write_text(content))


def write_pictures(folder: Path, report: Report) -> None:
    """The report's pictures as PNG."""
    for name, figure in report.pictures.items():
        atomic_write(
            folder / f"{name}.png",
            lambda path, figure=figure: figure.savefig(path, format="png", dpi=130, metadata={"Software": None}),
        )


def main() -> None:
    args = parse_arguments()
    bench = prepare(args)
    results = read_results(args.json) if args.json else {"experiments": {}}
    if args.json:
        write_results(args.json, results)  # before hours are spent: the place may take no file
    if args.plots:
        atomic_write(args.plots / "bench.txt", lambda path: path.write_text(setting(bench) + "\n"))
    for name in EXPERIMENTS if args.full else args.only or ["headline"]:
        report = EXPERIMENTS[name](bench)
        where = setting(bench)
        if args.json:
            results["experiments"][name] = {"setting": where, **report.data}
            write_results(args.json, results)
        if args.plots:
            write_pictures(args.plots, report)
        with heedless() if args.json else nullcontext():
            print(f"**{name}**: {EXPERIMENTS[name].__doc__.splitlines()[0]}\n\n{report.text}\n\n{where}\n", flush=True)


if __name__ == "__main__":
    run_script(main)
