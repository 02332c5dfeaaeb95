"""Measure what a distillation step costs, beside fine-tuning in the plain published way: see docs/benchmarks.md.

Each measurement runs in a process of its own, one after the other. This one only asks and adds up.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks import results
from benchmarks.shapes import SHAPES, is_real
from kdbench import cli, files, methods
from kdbench.errors import UserError, nearest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("scaling", "settings", "data_parallel", "generation", "embedded")
BATCH_SIZE = 4
STEPS = 5  # that are counted, at most
FEW = 3  # the same where there is no ceiling to hold
_FURTHER = 3  # steps for which there are records besides those that are counted: warm-up, split, and one that keeps the epoch from ending
SCALED = "vanilla_kd"  # the method whose time is told for several batch sizes and vocabularies
BATCH_SIZES = (2, 4, 8, 16)
VOCABULARIES = {"32k": "32k", "50k": "same", "152k": "152k"}  # name of the pair (`benchmarks.rows.PAIRS`) of each
PARALLEL = ("simple_ctkd", "cached", 16)  # method, teacher and records of a step that two processes share
SETTINGS = {"compile": True, "gradient_checkpointing": True}  # of `hardware`, with values other than the default


class Bench:
    """Starts measurements. As a context it ends, when it is left, the process that most of them are forked from.

    Args:
        folder: for what they read and write.
        shapes: key of `benchmarks.shapes.SHAPES`.
        threads: of each process.
        steps: that are counted, at most.
    """

    def __init__(self, folder: Path, shapes: str, threads: int, steps: int):
        self.folder, self.shapes, self.threads, self.steps = folder, shapes, threads, steps
        self._server: subprocess.Popen | None = None

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_) -> None:
        if self._server is not None:
            self._server.stdin.close()
            self._server.wait()

    def prepare(self, pairs: set[str], batch_sizes: set[int], cached: bool) -> None:
        """Make what measurements of these pairs and batch sizes read, of all combinations.

        Args:
            pairs: keys of `benchmarks.rows.PAIRS`.
            batch_sizes: records of a step.
            cached: whether the teacher's cache is wanted.
        """
        wanted = [f"{pair}/{size}" for pair in sorted(pairs) for size in sorted(batch_sizes)]
        of = [str(self.folder), self.shapes, str(self.steps + _FURTHER), *wanted]
        self._run([sys.executable, "-m", "benchmarks.rows", *of, *(["--cached", *wanted] if cached else [])])

    def measure(
        self,
        method: str,
        pair: str = "cross",
        source: str = "live",
        batch_size: int = BATCH_SIZE,
        steps: int = FEW,
        split: bool = False,
        processes: int = 1,
        **hardware,
    ) -> dict:
        """One measurement; the result of `benchmarks.measure`.

        Args:
            method: name in the registry, or "floor".
            pair: key of `benchmarks.rows.PAIRS`.
            source: "live" or "cached", of the teacher.
            batch_size: records of a step, over all processes.
            steps: that are counted at most.
            split: whether to tell where the time goes.
            processes: of the training.
            hardware: settings other than the default.
        """
        output = self.folder / "result.json"
        output.unlink(missing_ok=True)
        hardware |= {"processes": processes} if processes > 1 else {}
        arguments = [str(self.folder / pair / str(batch_size)), method, "--teacher", source]
        arguments += ["--batch-size", str(batch_size), "--steps", str(steps), "--output", str(output)]
        arguments += ["--hardware", json.dumps({"threads": self.threads} | hardware)]
        arguments += ["--split"] if split else []
        if processes > 1:
            start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend", "c10d"]
            start += ["--rdzv_endpoint", "localhost:0"]
            self._run([sys.executable, *start, "-m", "benchmarks.measure", *arguments])
        else:
            self._serve(arguments)
        found = files.read_json(output)
        told = f"{found['seconds']:.3f} s, {found['cpu_seconds']:.3f} CPU s, {found['peak_gb']:.2f} GB"
        print(f"{method}, teacher {source}, {pair}, {batch_size} records, {hardware or 'default'}: {told}", flush=True)
        return found

    def tell(self, module: str, *arguments: str) -> dict:
        """What another program of the benchmark prints, as JSON."""
        return json.loads(self._run([sys.executable, "-m", module, *arguments]))

    def _serve(self, arguments: list[str]) -> None:
        """Measure in a child of the process that has everything imported."""
        log = self.folder / "measure.log"
        if self._server is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(log, "w") as file:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file, "text": True}
                command = [sys.executable, "-m", "benchmarks.serve"]
                self._server = subprocess.Popen(command, cwd=ROOT, env=self._environment(), **pipes)
        self._server.stdin.write(json.dumps(arguments) + "\n")
        self._server.stdin.flush()
        if self._server.stdout.readline().strip() != "0":
            raise UserError(f"benchmarks.measure {' '.join(arguments)} failed:\n{log.read_text()[-3000:]}")

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=ROOT, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        threads = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "DS_ACCELERATOR": "cpu"}
        return os.environ | threads | ours


def measured_methods(only: list[str] | None) -> dict[str, dict]:
    """The methods that are measured, with what they need; those that train like sft, on other texts, are not.

    Raises:
        UserError: `only` names a method that there is not.
    """
    found = {}
    for name in methods.names() if only is None else only:
        if name not in methods.names():
            raise UserError(nearest(name, methods.names(), "a method"))
        cls = methods.get(name)
        needs = cls.needs(cls.Settings())
        if needs.teacher != "answers":
            pair = "cross" if cls.across_tokenizers or needs.teacher == "none" else "same"
            found[name] = {"pair": pair, "sources": ["live", "cached"] if needs.teacher == "signal" else ["live"]}
    return found


def of_methods(bench: Bench, chosen: dict[str, dict], quick: bool) -> dict:
    """The floor, measured before, between and after them, and the methods."""
    bench.prepare({"cross"} | {of["pair"] for of in chosen.values()}, {BATCH_SIZE}, cached=not quick)
    floors = [bench.measure("floor")]
    found = {}
    for number, (method, of) in enumerate(chosen.items()):
        if not quick and len(chosen) > 2 and number == len(chosen) // 2:
            floors.append(bench.measure("floor"))
        sources = of["sources"][:1] if quick else of["sources"]
        found[method] = {
            source: bench.measure(
                method, of["pair"], source, steps=bench.steps if source == "live" else FEW, split=True
            )
            for source in sources
        }
        if len(of["sources"]) == 1:
            found[method]["cached"] = found[method]["live"].copy()  # no teacher: the same measurement
    floors.append(bench.measure("floor"))
    return {"floor": together(floors), "methods": found}


def together(measured: list[dict]) -> dict:
    """Several measurements of one thing as one: all of their steps, the most memory."""
    steps = [step for one in measured for step in one["steps"]]
    return measured[0] | {
        "seconds": statistics.median(steps),
        "seconds_min": min(steps),
        "seconds_max": max(steps),
        "steps": steps,
        "cpu_seconds": statistics.median(one["cpu_seconds"] for one in measured),
        "peak_gb": max(one["peak_gb"] for one in measured),
        "loading_gb": max(one["loading_gb"] for one in measured),
        "tokens_per_second": statistics.median(one["tokens_per_second"] for one in measured),
    }


def of_scaling(bench: Bench, known: dict) -> dict:
    """Time and memory of a step of one method for several batch sizes and vocabularies, with the teacher live.

    Args:
        bench: measures.
        known: the methods that are measured already.
    """
    bench.prepare({"same"}, set(BATCH_SIZES), cached=False)
    bench.prepare(set(VOCABULARIES.values()), {BATCH_SIZE}, cached=False)
    usual = known[SCALED]["live"] if SCALED in known else bench.measure(SCALED, "same")
    sizes = {
        size: usual if size == BATCH_SIZE else bench.measure(SCALED, "same", batch_size=size) for size in BATCH_SIZES
    }
    return {
        "method": SCALED,
        "batch_size": {str(size): of for size, of in sizes.items()},
        "vocabulary": {
            name: usual if pair == "same" else bench.measure(SCALED, pair) for name, pair in VOCABULARIES.items()
        },
    }


def of_settings(bench: Bench, known: dict) -> dict:
    """Time of a step of one method, which is measured already, with settings of `hardware` other than the default, beside the default's."""
    default = known["sft"]["live"] if "sft" in known else bench.measure("sft")
    found = {}
    for name, value in SETTINGS.items():
        one = bench.measure("sft", **{name: value})
        found[name] = {"value": value, "ratio": one["seconds"] / default["seconds"], **one}
    return found


def of_data_parallel(bench: Bench, known: dict) -> dict:
    """How many times faster two processes of one thread are than one, at the same global batch."""
    method, source, batch_size = PARALLEL
    bench.prepare({"cross"}, {batch_size}, cached=source == "cached")
    one, two = (bench.measure(method, "cross", source, batch_size, processes=count) for count in (1, 2))
    ratio = one["seconds"] / two["seconds"]
    return {"method": method, "teacher": source, "batch_size": batch_size, "ratio": ratio, "one": one, "two": two}


def machine(threads: int) -> dict:
    """Where the figures are from."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": psutil.virtual_memory().total / 1e9,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def run(options: argparse.Namespace, folder: Path) -> dict:
    """All measurements that the options ask for."""
    with Bench(folder, options.shapes, options.threads, options.steps) as bench:
        return _run(options, bench)


def _run(options: argparse.Namespace, bench: Bench) -> dict:
    chosen = measured_methods(options.only)
    began = time.monotonic()
    found = {"machine": machine(options.threads)}
    found |= of_methods(bench, chosen, options.quick)
    results.complete(found)
    found["setup"] = {"shapes": options.shapes, "batch_size": BATCH_SIZE}
    found["setup"] |= {"records": "real" if is_real(SHAPES[options.shapes]) else "generated"}
    parts = options.parts if options.parts is not None else PARTS if _is_whole(options) else []
    makers = {"scaling": of_scaling, "settings": of_settings, "data_parallel": of_data_parallel}
    for part in parts:
        found[part] = makers[part](bench, found["methods"]) if part in makers else bench.tell(f"benchmarks.{part}")
    found["machine"]["minutes"] = (time.monotonic() - began) / 60
    return found


def _is_whole(options: argparse.Namespace) -> bool:
    return not (options.only or options.quick)


def _listed(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument(
        "--only", type=_listed, metavar="METHODS", help="these methods, with commas between them, and no other part"
    )
    parser.add_argument("--quick", action="store_true", help="teacher live only, no other part: while you optimise")
    parser.add_argument(
        "--parts",
        type=_listed,
        metavar="PARTS",
        help=f"which of {','.join(PARTS)}; by default all, or none with --only or --quick",
    )
    parser.add_argument("--shapes", choices=SHAPES, default="full", help="sizes of the models; `tiny` is for tests")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are counted, at most (at least 3)")
    parser.add_argument(
        "--folder", type=Path, help="keep models and records here, for further runs of this very version"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for bench.json and bench.md; {RESULTS.relative_to(ROOT)} if everything is measured, else none",
    )
    options = parser.parse_args()
    for part in options.parts or []:
        if part not in PARTS:
            raise UserError(nearest(part, PARTS, "a part"))
    whole = _is_whole(options) and options.parts is None and options.shapes == "full"
    output = options.output or (RESULTS if whole else None)
    earlier = (output or RESULTS) / "bench.json"
    before = files.read_json(earlier) if earlier.exists() else None
    if options.folder is not None:
        found = run(options, options.folder)
    else:
        with tempfile.TemporaryDirectory(prefix="kdbench-bench-") as folder:
            found = run(options, Path(folder))
    if output is not None:
        files.write_json(output / "bench.json", found)
        files.write_text(output / "bench.md", results.tables(found))
    print(results.tables(found))
    for line in [] if before is None else results.slower(found, before):
        print(f"slower than before: {line}")
    missed = results.missed(found) if options.shapes == "full" else []
    for line in missed:
        print(f"ceiling missed: {line}", file=sys.stderr)
    sys.exit(bool(missed))


if __name__ == "__main__":
    cli.run(main)
