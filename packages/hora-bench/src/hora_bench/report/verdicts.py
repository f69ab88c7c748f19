"""The paper's claims, each with what the result files at hand allow to say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from scipy import stats

from hora_bench.report.comparisons import parameters
from hora_bench.report.judging import (
    ABSENT,
    CONFIRMED,
    UNRESOLVED,
    UNTESTED,
    Said,
    edge_said,
    of_difference,
    others,
    points,
    unless,
)
from hora_bench.report.ranges import explained, wider
from hora_bench.report.robustness import robust, wrong_labels
from hora_bench.report.rows import COMPARISONS, Row, is_lora, name_of, paired, proxy_of, rows_of, typical
from hora_bench.report.suites import CLAIMS, Claim, compared
from hora_bench.report.tables import judged_gates
from hora_bench.stats import MARGIN
from hora_bench.store import RunResult

Result = dict[str, Any]
Records = Sequence[tuple[Path, dict[str, Any]]]
AHEAD: Final = 1.2
NO_SLOWER: Final = 1.05
SIGNIFICANT: Final = 0.05
LEAKY: Final = "leaky_relu"
NOTHING_COMMON: Final = 0.1  # mean cosine below which heads count as unlike


class Verdict(NamedTuple):
    """A claim, what is said of it, why, and the file that says so."""

    claim: str
    word: str
    why: str
    file: Path | None = None


def verdicts(records: Records, runs: Sequence[RunResult] = ()) -> list[Verdict]:
    """A verdict on every claim.

    Parameters
    ----------
    records
        Result files of experiments and their content. Every file that can judge a claim does; of regressions the one
        with the most trials does, which supersedes the others.
    runs
        Results of runs: those of whole suites judge the claims on suites.
    """
    found = [verdict for claim in CLAIMS for verdict in _of_suite(claim, runs)]
    for claim, experiments, judge in JUDGES:
        own = [(path, content["result"]) for path, content in records if content["experiment"] in experiments]
        if experiments == ("theory",):
            own = sorted(own, key=lambda one: len(one[1].get("pieces", ())))[-1:]
        judged = [Verdict(claim, word, why, path) for path, result in own for word, why in judge(result)]
        command = experiments[0].replace("-", " ")
        found += judged or [Verdict(claim, UNTESTED, f"no result that could tell: see `hora-bench {command}`")]
    return found


def _of_suite(claim: Claim, runs: Sequence[RunResult]) -> Iterator[Verdict]:
    """One verdict per method and circumstances in which whole suites were run, LoRA's too."""
    found = list(compared(claim, runs))
    for name, difference in found:
        yield Verdict(claim.text, of_difference(difference, claim.points), f"{name}: {points(difference)}")
    if not found:
        yield Verdict(claim.text, UNTESTED, f"`{claim.command}`, and this page says what it shows")


def _at_one_percent(result: Result) -> Said:
    """By paired differences, against a fifth of LoRA's accuracy."""
    for lora, rows in _tuned(result):
        for row in rows:
            if row["fraction"] == 0.01 and name_of(row).startswith("hora"):
                edge, wanted = edge_said(row, lora), (AHEAD - 1) * lora["mean_pct"]
                yield (
                    unless(edge, of_difference(row["over_lora"], 2 * wanted)),
                    (
                        f"{name_of(row)} has {row['mean_pct']} % on {row['task']}, LoRA {lora['mean_pct']} %: "
                        f"{points(row['over_lora'])}; claimed are {wanted:.1f}{edge}"
                    ),
                )


def _more_accurate(result: Result) -> Said:
    """By paired differences of the default, or of what stands first, where every choice had a rate of its own."""
    for lora, rows in _tuned(result):
        first = next((row for row in rows if name_of(row) == "default" or name_of(row).startswith("hora")), None)
        if first is None or first["fraction"] == 0.01:
            continue
        edge, margin = edge_said(first, lora), result["setting"].get("margin_pct", MARGIN)
        within = f" (equal: within {margin:g} point{'s' * (margin != 1)})" if len(rows) > 1 else ""
        yield (
            unless(edge, of_difference(first["over_lora"])),
            (
                f"{name_of(first)} on {100 * first['fraction']:g} % of {first['task']}: {points(first['over_lora'])}"
                f"{edge}{others(rows, first)}{within}"
            ),
        )


def _tuned(result: Result) -> Iterator[tuple[Row, list[Row]]]:
    """LoRA, and the rows compared with it, of every task and fraction that a search went before; no screens."""
    rows = [row for row in rows_of(result) if result.get("search") and not proxy_of(result)]
    for where in dict.fromkeys((row["task"], row["fraction"]) for row in rows):
        here = [row for row in rows if (row["task"], row["fraction"]) == where]
        lora = next((row for row in here if name_of(row) == "lora"), None)
        compared = [row for row in here if row["over_lora"] is not None and not is_lora(row)]
        if lora is not None:
            yield lora, compared


def _parameters(result: Result) -> Said:
    share = result["paper"][-1]["params_pct"]
    yield CONFIRMED if round(share, 2) == 0.09 else ABSENT, f"{share} % with `AdapterSpec.paper(32)`"


def _macs(result: Result) -> Said:
    macs = {step["step"].partition(":")[0]: step["macs"] for step in result["paper"] if step.get("paper_macs")}
    branch = next(step["macs"] for step in result["paper"] if step["step"].startswith("HoRA by branch:"))
    dense = macs["HoRA"] / macs["LoRA"]
    yield (
        CONFIRMED if round(dense) == 6 else ABSENT,
        (
            f"{dense:.2f} times, if one token is counted and a dense update formed; neither is needed: by branch "
            f"{branch / macs['LoRA']:.2f} times at one token, and the difference is once a pass, not once a token"
        ),
    )


def _merged_inference(result: Result) -> Said:
    """By the medians of every HoRA method on every backend."""
    merged = [
        record["over_frozen"]["ratio"]
        for record in result["inference"]
        if record["form"] == "merged" and "hora" in record["method"] and "over_frozen" in record
    ]
    if merged:
        yield (
            CONFIRMED if max(merged) <= NO_SLOWER else ABSENT,
            (
                f"merged models take {min(merged)} to {max(merged)} of the frozen model's time, {len(merged)} methods "
                "and backends"
            ),
        )


def _alike_heads(result: Result) -> Said:
    """By a sign test over layers and projections, which are not independent of each other.

    HoRA is compared with LoRA, or, where that was not trained, with heads that have nothing in common.
    """
    of: Mapping[str, dict[tuple[int, str], float]] = {"hora": {}, "lora": {}}
    for record in result["layers"]:
        if record["method"] in of:
            of[record["method"]][record["layer"], record["projection"]] = record["mean_cosine_delta"]
    pairs = [(own, of["lora"].get(where, 0.0)) for where, own in of["hora"].items()]
    if pairs:
        above = sum(own > other for own, other in pairs)
        ours, theirs = (round(sum(values) / len(pairs), 2) + 0.0 for values in zip(*pairs, strict=True))
        activation = result["setting"]["options"].get("activation", LEAKY)
        reference = f"{theirs} with LoRA" if of["lora"] else "0 if heads had nothing in common"
        cause = _why_alike(result, activation, theirs if of["lora"] else None)
        surprising = stats.binomtest(above, len(pairs), alternative="greater").pvalue < SIGNIFICANT
        yield (
            CONFIRMED if surprising else UNRESOLVED,
            (
                f"mean cosine of two heads' updates {ours} with HoRA ({activation}), {reference}; higher in {above} of "
                f"{len(pairs)} layers and projections; one task, one seed{cause}"
            ),
        )


def _why_alike(result: Result, activation: str, free: float | None) -> str:
    """What heads have in common where nothing is shared, and what a generator makes of them before any data."""
    drawn = {one["parametrisation"]: one["mean_cosine_of_columns"] for one in result.get("start", [])}
    compared = [name for name in dict.fromkeys((activation, LEAKY, "tanh")) if f"{name}, A direct" in drawn]
    parts = []
    if free is not None and free < NOTHING_COMMON:
        parts.append(f"the data do not ask for it: LoRA's heads, which are free, end at {free}")
    if compared:
        found = ", ".join(f"{drawn[f'{name}, A direct']:.2f} with {name}" for name in compared)
        parts.append(f"columns of a generator at random, before any data, have {found}")
    return "".join(f"; {part}" for part in parts)


def _asked_alike(result: Result) -> Said:
    """By the similarity of gradient signals, coordinate by coordinate: what a generator that serves all heads sees."""
    rank = result["setting"]["rank"]
    found = {(one["task"], one["state"], one["seed"]): {} for one in result["summary"]}
    for one in result["summary"]:
        found[one["task"], one["state"], one["seed"]][one["projection"], one["measure"]] = one
    for (task, state, _), of in found.items():
        alike = [of[p, "similarity"] for p in "qv"]
        above = all(one["low"] > one["by_chance"][1] for one in alike)
        absent = all(one["high"] < NOTHING_COMMON for one in alike)
        frame, inputs, own = (
            " and ".join(f"{of[p, name]['mean']:.2f}" for p in "qv")
            for name in ("similarity_in_frame", "inputs_one", "inputs_own")
        )
        means = " and ".join(f"{one['mean']:+.3f}" for one in alike)
        chance = max(one["by_chance"][1] for one in alike)
        yield (
            CONFIRMED if above else ABSENT if absent else UNRESOLVED,
            (
                f"{state}, {task}: similarity of Q and V {means}, by chance up to {chance:.3f}; in a frame free of a "
                f"head's coordinates {frame}. One basis of {rank} directions that all heads read holds {inputs} of the "
                f"signal, a basis for each {own}, random directions {of['q', 'inputs_one']['by_chance'][0]:.2f}"
            ),
        )


def _joint(result: Result) -> Said:
    """By paired differences of what starts from a joint A, each at a rate of its own."""
    for lora, rows in _tuned(result):
        control = next((row for row in rows if name_of(row).startswith("random")), None)
        for row in (row for row in rows if name_of(row).startswith("joint")):
            edge = edge_said(row, lora)
            beside = "" if control is None else f"; over a random A, fixed, {points(paired(row, control))}"
            yield (
                unless(edge, of_difference(row["over_lora"])),
                (
                    f"{name_of(row)} on {100 * row['fraction']:g} % of {row['task']}, {parameters(row) or 'unknown'} "
                    f"trained parameters, LoRA {parameters(lora) or 'unknown'}: {points(row['over_lora'])}, median "
                    f"{typical(row, lora)}{beside}; lowest seeds {min(row['accuracies_pct']):.1f} %, LoRA's "
                    f"{min(lora['accuracies_pct']):.1f} %{edge}"
                ),
            )


def _recovery(result: Result) -> Said:
    judged = judged_gates(result)
    if judged:
        outcomes = [one["outcome"] for one in judged]
        word = ABSENT if "failed" in outcomes else CONFIRMED if set(outcomes) == {"passed"} else UNRESOLVED
        open_ones = [
            f"{one['gate']}: slopes differ by {one['difference']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f}), "
            f"{one['outcome']}"
            for one in judged
            if one["outcome"] != "passed"
        ]
        identified = [one["sharing"] for one in result["identify"] if one["identified"]]
        yield (
            word,
            (
                f"{outcomes.count('passed')} of {len(judged)} gates passed, {result['setting']['trials']} trials"
                f"{''.join(f'; {one}' for one in open_ones)}. Without noise updates are identified with sharing "
                f"{', '.join(identified) or 'none'}. For the recovery of updates when a head is redundant, in a "
                "regression; not for prediction, and not for training"
            ),
        )


def _survives(result: Result) -> Said:
    """By the gates on recovery when a head is redundant, of every activation but the one that was there before."""
    found: dict[str, list[dict[str, Any]]] = {}
    for gate in result["gates"]:
        if gate["activation"] != "identity" and gate["bounds"][1] == 0:
            found.setdefault(gate["activation"], []).append(gate)
    outcomes = {gate["outcome"] for gates in found.values() for gate in gates}
    word = ABSENT if "failed" in outcomes else CONFIRMED if outcomes == {"passed"} else UNRESOLVED
    said = [
        f"{name} {gates[0]['difference']:+.2f} ({gates[0]['low']:+.2f} to {gates[0]['high']:+.2f}), "
        + " and ".join(dict.fromkeys(gate["outcome"] for gate in gates))
        for name, gates in found.items()
    ]
    what = f"slopes of D2 with sharing less without, {result['setting']['trials']} trials each, and both recovery gates"
    yield word, f"{what}: {'; '.join(said)}"


JUDGES: Final[tuple[tuple[str, tuple[str, ...], Callable[[Result], Said]], ...]] = (
    ("more accurate than LoRA", COMPARISONS, _more_accurate),
    ("over 20 % better than LoRA at 1 % of the data", COMPARISONS, _at_one_percent),
    ("polynomial instead of exponential sample complexity", ("theory",), _recovery),
    ("ours: sharing recovers faster with other activations, too", ("theory-activations",), _survives),
    ("0.09 % of LLaMA-7B is trained", ("cost",), _parameters),
    ("about 6 times LoRA's FLOPs", ("cost",), _macs),
    ("no cost at inference once merged", ("speed",), _merged_inference),
    ("sharing makes the heads' updates alike", ("similarity",), _alike_heads),
    ("ours: data ask the heads for alike updates", ("signal",), _asked_alike),
    ("ours: the default has a wider range of learning rates than LoRA", ("rates",), wider),
    ("ours: the Hessian at the start explains how high a rate may be", ("rates",), explained),
    ("ours: a joint A, fixed, is more accurate than LoRA", COMPARISONS, _joint),
    ("ours: more robust than LoRA at equal clean accuracy", ("robustness",), robust),
    ("ours: more accurate than LoRA where labels are wrong", COMPARISONS, wrong_labels),
)
