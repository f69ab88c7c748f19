"""The paper's claims, each confirmed, not seen, or not testable with the result files at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from scipy import stats

from hora_bench.experiments.markdown import cell

Result = dict[str, Any]
Word = Literal["confirmed", "not seen", "cannot be tested here"]
Said = Iterator[tuple[bool, str]]
CONFIRMED: Final = "confirmed"
NOT_SEEN: Final = "not seen"
UNTESTED: Final = "cannot be tested here"
AHEAD: Final = 1.2
NO_SLOWER: Final = 1.05
SIGNIFICANT: Final = 0.05


class Verdict(NamedTuple):
    """A claim, what is said of it, why, and the file that says so."""

    claim: str
    word: Word
    why: str
    file: Path | None = None


def verdicts(records: Sequence[tuple[Path, dict[str, Any]]]) -> list[Verdict]:
    """A verdict on every claim.

    Parameters
    ----------
    records
        Result files and their content. Every file that can judge a claim does; without one it stays open.
    """
    found = list(BEYOND_REACH)
    for claim, experiment, judge in JUDGES:
        own = [(path, content["result"]) for path, content in records if content["experiment"] == experiment]
        judged = [
            Verdict(claim, CONFIRMED if holds else NOT_SEEN, why, path)
            for path, result in own
            for holds, why in judge(result)
        ]
        found += judged or [Verdict(claim, UNTESTED, f"no result that could tell: see `hora-bench {experiment}`")]
    return found


def _at_one_percent(result: Result) -> Said:
    """By intervals, which hold the test split's answers and the scatter between seeds."""
    points = {point["method"]: point for point in result["curve"] if point["fraction"] == 0.01}
    lora = points.get("lora")
    for method, own in points.items():
        if lora is not None and method.startswith("hora"):
            rates, seeds = len(result["setting"]["learning_rates"]), len(own["accuracies_pct"])
            apart = own["low_pct"] > lora["high_pct"]
            yield (
                apart and own["mean_pct"] > AHEAD * lora["mean_pct"],
                (
                    f"{method} has {_interval(own)} % on {result['setting']['task']}, LoRA {_interval(lora)} %; "
                    f"{seeds} seeds, each at the best of {rates} rates"
                ),
            )


def _more_accurate(result: Result) -> Said:
    """By paired differences, where every choice had a learning rate of its own."""
    rows = [row for row in result["rows"] if row.get("over_lora_pct", {}).get("low_pct") is not None]
    if rows:
        default, *others = rows
        ahead = [f"{row['factor']} {row['value']}" for row in others if row["over_lora_pct"]["low_pct"] > 0]
        yield (
            default["over_lora_pct"]["low_pct"] > 0,
            (
                f"the default of the time {_interval(default['over_lora_pct'])} points on {result['setting']['task']}, "
                f"{len(default['accuracies_pct'])} seeds; with their whole interval above LoRA, of {len(others)} other "
                f"choices: {', '.join(ahead) or 'none'}"
            ),
        )


def _parameters(result: Result) -> Said:
    share = result["paper"][-1]["params_pct"]
    yield round(share, 2) == 0.09, f"{share} % with `AdapterSpec.paper(32)`"


def _macs(result: Result) -> Said:
    macs = {step["step"].partition(":")[0]: step["macs"] for step in result["paper"] if step.get("paper_macs")}
    branch = next(step["macs"] for step in result["paper"] if step["step"].startswith("HoRA by branch:"))
    dense = macs["HoRA"] / macs["LoRA"]
    yield (
        round(dense) == 6,
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
            max(merged) <= NO_SLOWER,
            (
                f"merged models take {min(merged)} to {max(merged)} of the frozen model's time, {len(merged)} methods "
                "and backends"
            ),
        )


def _alike_heads(result: Result) -> Said:
    """By a sign test over layers and projections, which are not independent of each other.

    HoRA is compared with LoRA, or, where that was not trained, with heads that have nothing in common.
    """
    of: dict[str, dict[tuple[int, str], float]] = {"hora": {}, "lora": {}}
    for record in result["layers"]:
        of.setdefault(record["method"], {})[record["layer"], record["projection"]] = record["mean_cosine_delta"]
    pairs = [(own, of["lora"].get(where, 0.0)) for where, own in of["hora"].items()]
    if pairs:
        above = sum(own > other for own, other in pairs)
        ours, theirs = (round(sum(values) / len(pairs), 2) + 0.0 for values in zip(*pairs, strict=True))
        activation = result["setting"]["options"].get("activation", "leaky_relu")
        reference = f"{theirs} with LoRA" if of["lora"] else "0 if heads had nothing in common"
        yield (
            stats.binomtest(above, len(pairs), alternative="greater").pvalue < SIGNIFICANT,
            (
                f"mean cosine of two heads' updates {ours} with HoRA ({activation}), {reference}; higher in {above} of "
                f"{len(pairs)} layers and projections; one task, one seed"
            ),
        )


def _recovery(result: Result) -> Said:
    gates = result["gates"]
    if gates:
        failed = [gate for gate in gates if not gate["passed"]]
        missed = [f" ({g['gate']} is {g['value']:.3f}, not in {g['low']:g} to {g['high']:g})" for g in failed]
        passed = f"{len(gates) - len(failed)} of {len(gates)} gates passed{''.join(missed)}"
        yield (
            not failed,
            (
                f"{passed}: for the recovery of updates when a head is redundant, in a regression; not for prediction, "
                "and not for training"
            ),
        )


BEYOND_REACH: Final = (
    Verdict(
        "VTAB-1K: mean 74.4, 2.2 above LoRA",
        UNTESTED,
        "neither the 19 data sets nor the backbone are at hand; with them: `hora-bench run vtab DIR --tune`",
    ),
    Verdict(
        "FGVC: mean 89.96, 5.2 above LoRA",
        UNTESTED,
        "nor are these 5 data sets; with them: `hora-bench run fgvc DIR --tune`",
    ),
    Verdict(
        "commonsense reasoning: 1.7 above LoRA on LLaMA-7B, 2.6 on 13B",
        UNTESTED,
        "the models need GPUs; with them: `hora-bench run commonsense --config llama-7b`",
    ),
)
JUDGES: Final[tuple[tuple[str, str, Callable[[Result], Said]], ...]] = (
    ("more accurate than LoRA", "ablate", _more_accurate),
    ("over 20 % better than LoRA at 1 % of the data", "sample-efficiency", _at_one_percent),
    ("polynomial instead of exponential sample complexity", "theory", _recovery),
    ("0.09 % of LLaMA-7B is trained", "cost", _parameters),
    ("about 6 times LoRA's FLOPs", "cost", _macs),
    ("no cost at inference once merged", "speed", _merged_inference),
    ("sharing makes the heads' updates alike", "similarity", _alike_heads),
)


def _interval(found: dict[str, float]) -> str:
    return cell({name: found[name] for name in ("mean_pct", "low_pct", "high_pct")})
