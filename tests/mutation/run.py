"""Mutation testing: change one thing in a module, and see whether its tests notice.

    python tests/mutation/run.py [MODULE ...] [--workers N] [--seconds S] [--list]

MODULE is a pattern such as ``hora_torch.linear`` or ``hora_jax.*``; by default all modules of ``modules.toml``. What
survives must stand in ``survivors.toml`` with a reason, and what stands there must survive; then ``ran.json`` says so
of this source. A run that was stopped goes on where it was: results lie in ``results/mutation/``, and hold as long as
the module does; those of survivors as long as its tests do, too. A survivor costs most, since every test of its lines
runs: ``--seconds 4`` first tells in a tenth of the time what may survive. Needs Linux.
"""

import argparse
import contextlib
import fnmatch
import json
import math
import os
import queue
import time
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modules import HERE, RAN, ROOT, Module, modules
from mutants import Mutant, mutants
from runner import NotRun, Runner
from selection import Selection, record

RESULTS = ROOT / "results" / "mutation"


def main() -> None:
    """Entry point; exits with 1 if a survivor is not on the list, or what is listed does not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=["*"], metavar="MODULE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        metavar="S",
        help="a first pass: S processor seconds of tests each",
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    known = {module.name: module for module in modules()}
    chosen = [known[name] for pattern in options.modules for name in fnmatch.filter(known, pattern)]
    if not chosen:
        raise SystemExit(f"a module is one of {', '.join(known)}, got {options.modules}")
    if options.list:
        print("\n".join(f"{m.name} {mutant.name}" for m in chosen for mutant in mutants(m.source)))
        return
    problems = []
    for module in dict.fromkeys(chosen):
        try:
            found = check(module, options.workers, options.seconds)
        except NotRun as error:
            found = [f"{module.name} was not run to its end: {error}"]
        print("\n".join(found), flush=True)
        problems += found
    raise SystemExit(bool(problems))


def check(module: Module, workers: int, seconds: float = math.inf) -> list[str]:
    """Run the mutants of a module; what is wrong with the list of survivors, and what a first pass leaves open."""
    start = time.monotonic()
    every = list(mutants(module.source))
    state = module.digests()["source"]
    results = run(module, every, workers, seconds)
    counts = Counter(result["outcome"] for result in results.values())
    total = {outcome: counts[outcome] for outcome in ("killed", "timeout", "survived")}
    print(f"{module.name}: {len(every)} mutants, {dict(counts)}, {time.monotonic() - start:.0f} s", flush=True)
    listed = tomllib.loads((HERE / "survivors.toml").read_text()).get(module.name, [])
    names = {entry["mutant"] for entry in listed if entry["why"]}
    alive = {name for name, result in results.items() if result["outcome"] == "survived"}
    left = {name for name, result in results.items() if result["outcome"] == "open"}
    caught = {name for name, result in results.items() if result["outcome"] == "killed"}
    problems = [
        *(f"{module.name} met some of its tests and survived: {name}" for name in sorted(left - names)),
        *(f"{module.name} survived, kill it or list it: {name}" for name in sorted(alive - names)),
        *(f"{module.name} is listed and caught: {name}" for name in sorted(names & caught)),
        *(f"{module.name} is listed and no mutant: {name}" for name in sorted(names - results.keys())),
    ]
    if not problems and not left:
        ran = json.loads(RAN.read_text()) | {module.name: {"source": state, **total}}
        RAN.write_text(json.dumps(dict(sorted(ran.items())), indent=1) + "\n")
    return problems


def run(module: Module, every: Sequence[Mutant], workers: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Result of each mutant by name: those that still hold, and the others anew; what stays open is not kept."""
    path = RESULTS / f"{module.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = module.digests()
    names = {mutant.name for mutant in every}
    results = {name: result for name, result in _stored(path, digests).items() if name in names}
    left = [mutant for mutant in every if mutant.name not in results]
    if not left:
        return results
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(contextlib.closing(Runner(module))) for _ in range(min(workers, len(left)))]
        selection = prepared(module, runners)
        free: queue.Queue[Runner] = queue.Queue()
        for runner in runners:
            free.put(runner)
        kills: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}

        def one(mutant: Mutant) -> tuple[str, dict[str, Any]]:
            runner = free.get()
            try:
                return mutant.name, outcome(module, mutant, selection, runner, kills, seconds)
            finally:
                free.put(runner)

        pool = stack.enter_context(ThreadPoolExecutor(len(runners)))
        file = stack.enter_context(path.open("a"))
        for name, result in pool.map(one, left):
            if module.digests() != digests:
                pool.shutdown(cancel_futures=True)
                raise NotRun("the module and its tests stay as they are while they run, got a change: run again")
            results[name] = result
            if result["outcome"] != "open":
                print(json.dumps({"mutant": name, **result, **digests}), file=file, flush=True)
    return results


def prepared(module: Module, runners: Sequence[Runner]) -> Selection:
    """What each test runs; all tests pass on the module as it is, one after the other in one process."""
    selection = record(module, runners[0], RESULTS / "recorded")
    for runner in runners[1:]:
        runner.collect(module)
    _honest(module, selection, runners[0], selection.every, fresh=selection.fresh)
    return selection


def _honest(module: Module, selection: Selection, runner: Runner, tests: Sequence[str], *, fresh: bool) -> None:
    result = runner.run(module.source, tests, selection.seconds, fresh=fresh)
    if result["outcome"] != "survived":
        raise NotRun(f"its tests pass before it is mutated, got:\n{result['log']}")


def outcome(
    module: Module,
    mutant: Mutant,
    selection: Selection,
    runner: Runner,
    kills: dict[bool, Counter[str]],
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Whether a test notices a mutant; one whose lines no test runs survives.

    ``kills`` counts them by test, for each way to plant a mutant. A test that is said for the first time to
    notice one in an import of its own is run on the module as it is in the same way, and must pass.
    What survives ``seconds`` of its tests, and has more, is open.
    """
    start = time.monotonic()
    every, fresh = selection.of(mutant.lines, kills[True] + kills[False])
    tests = selection.within(every, seconds)
    result: dict[str, Any] = {"outcome": "survived"}
    if tests:
        result = runner.run(mutant.code, tests, selection.seconds, fresh=fresh)
        if result["outcome"] == "afresh":
            fresh = True
            result = runner.run(mutant.code, tests, selection.seconds, fresh=True)
    if result["outcome"] == "survived" and len(tests) < len(every):
        result["outcome"] = "open"
    if result["outcome"] == "killed":
        by = result.get("by") or tests[0]  # no test is named where the tests could not be collected
        if fresh and by not in kills[True]:
            _honest(module, selection, runner, [by], fresh=True)
        kills[fresh][by] += 1
    return result | {"run": len(tests), "time_s": round(time.monotonic() - start, 2)}


def _stored(path: Path, digests: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    results = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        result = json.loads(line)
        same = [result[key] == digests[key] for key in ("source", "tests")]
        if all(same) or (same[0] and result["outcome"] == "killed"):
            results[result["mutant"]] = result
    return results


if __name__ == "__main__":
    main()
