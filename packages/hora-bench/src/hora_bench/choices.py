"""What a comparison compares: choices that differ in something, alike in all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from hora_spec import HoraError

from hora_bench import methods
from hora_bench.request import Request, vary
from hora_bench.search import Grid
from hora_bench.setting import arguments_of
from hora_bench.stats import MARGIN

REFERENCE: Final = "lora"
SEARCHING: Final = 3  # seeds of a search that goes on, unless said


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What is compared: the table ``[vary]`` of a file.

    Attributes
    ----------
    methods, references
        Methods beside the base request's; with `methods` the base request's own is left out.
    factors
        What is changed one at a time, a field of the request or an option of the method, to the values tried.
    variants
        Name to several such changes at once.
    tasks, fractions
        All of that on each of these tasks, with each of these shares of the data.
    learning_rates
        Rates tried as one more factor.
    search
        Where every choice finds its own rate on validation, to be judged on the test split. None: all have the base
        request's rate and are judged on validation.
    seeds, search_seeds
        Of every choice, and those that search: the first, or the first three where a search goes on by itself.
    race
        So many seeds at a time; a choice stops once its difference from LoRA is settled. 0: all have all seeds.
    margin
        Points within which a choice is equal to LoRA.
    controls
        Backend to methods that are also trained on shuffled labels.
    """

    methods: Sequence[str] = ()
    references: Sequence[str] = ()
    factors: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tasks: Sequence[str] = ()
    fractions: Sequence[float] = ()
    learning_rates: Sequence[float] = ()
    search: Grid | None = None
    seeds: Sequence[int] = (0,)
    search_seeds: Sequence[int] = ()
    race: int = 0
    margin: float = MARGIN
    controls: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, vary: Mapping[str, Any]) -> Self:
        """From the table of a file; curves over fractions name the rates that they search ``learning_rates``.

        Raises
        ------
        HoraError
            The table has another entry, or one of another kind.
        """
        fields = dict(vary)
        if "fractions" in fields and "search" not in fields:
            fields["search"] = fields.pop("learning_rates", ())
        if "search" in fields:
            fields["search"] = Grid.of(fields["search"]) if fields["search"] != [] else None
        return cls(**arguments_of(fields, cls, *cls.__dataclass_fields__))

    def __post_init__(self) -> None:
        seeds = len(self.seeds)
        varied = {*self.factors, *(name for changes in self.variants.values() for name in changes)}
        varied |= {"learning_rate"} if self.learning_rates else set()
        chosen = {"seed"} | ({"learning_rate", "train_on", "score_on"} if self.search else set())
        if idle := sorted(varied & chosen):
            raise HoraError(
                f"what every choice has of its own cannot be varied, got {', '.join(idle)}: seeds are a list, and with "
                "a search it finds the rates and the test split judges; drop it"
            )
        if "last_blocks" in varied:
            raise HoraError("a comparison is a screen as a whole or not at all, got last_blocks varied: set it for all")
        if self.search_seeds and self.search is None:
            raise HoraError(f"search_seeds are those of a search, got {[*self.search_seeds]} without: drop them")
        if twice := sorted(set(self.search_seeds) & set(self.seeds)):
            raise HoraError(f"seeds that search and seeds that judge are different, got {twice} in both: change one")
        if self.race and not 2 <= self.race < seeds:
            raise HoraError(
                f"a race runs two seeds or more at a time, of more, got race {self.race} of {seeds}: change it"
            )
        if not 0 < self.margin < 100:
            raise HoraError(f"a margin is a positive number of points, got {self.margin}: write margin = 1.0")

    def with_seeds(self, seeds: Sequence[int]) -> Self:
        """The same with other seeds; so few that a race would have one look are no race."""
        return replace(self, seeds=seeds, race=self.race if self.race < len(seeds) else 0)

    @property
    def batches(self) -> list[Sequence[int]]:
        """Seeds that are run before differences are looked at."""
        size = self.race or len(self.seeds)
        return [self.seeds[first : first + size] for first in range(0, len(self.seeds), size)]

    @property
    def searching(self) -> Sequence[int]:
        """Seeds by whose mean a rate is chosen."""
        goes_on = self.search is not None and self.search.factor > 1
        return self.search_seeds or self.seeds[: SEARCHING if goes_on else 1]


@dataclass(frozen=True, slots=True)
class Choice:
    """A row: what is changed, to which value, and the request that this makes."""

    factor: str
    value: Any
    request: Request

    @property
    def circumstances(self) -> str:
        """The request but for the method and its rate: choices that agree here may be compared."""
        return self.request.model_dump_json(exclude={"method", "options", "learning_rate"})


def choices(base: Request, asked: Sweep) -> Iterator[Choice]:
    """Everything that is compared, on every task and fraction."""
    changes: list[tuple[str, Any, dict[str, Any]]] = [] if asked.methods else [("default", None, {})]
    changes += [("method", name, {"method": name}) for name in (*asked.methods, *asked.references)]
    factors = {**asked.factors, **({"learning_rate": asked.learning_rates} if asked.learning_rates else {})}
    changes += [(factor, value, {factor: value}) for factor, values in factors.items() for value in values]
    changes += [("variant", name, dict(values)) for name, values in asked.variants.items()]
    for task in asked.tasks or (base.task,):
        for fraction in asked.fractions or (base.fraction,):
            here = {"task": task, "fraction": fraction}
            yield from (Choice(factor, value, feasible(base, **{**here, **own})) for factor, value, own in changes)


def feasible(base: Request, **changes: Any) -> Request:
    """As `hora_bench.request.vary`, of a method that exists on the backend: no hours before it turns out."""
    asked = vary(base, **changes)
    methods.find(asked.method).check_backend(asked.backend)
    return asked


def lora_of(choice: Choice, chosen: Sequence[Choice]) -> Choice | None:
    """The first LoRA under the circumstances of a choice, which may be itself."""
    alike = (one for one in chosen if one.request.method == REFERENCE and one.circumstances == choice.circumstances)
    return next(alike, None)
