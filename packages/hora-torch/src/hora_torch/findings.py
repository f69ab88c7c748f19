"""Answers to questions about an adapted model."""

from dataclasses import dataclass
from typing import Literal

from hora_spec import HoraError

Verdict = Literal["ok", "wrong", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question about one place."""

    question: str
    place: str
    verdict: Verdict
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All answers; print it."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; what could not be told does not count."""
        return not self.of("wrong")

    def of(self, verdict: Verdict) -> list[Finding]:
        """Findings with one verdict."""
        return [finding for finding in self.findings if finding.verdict == verdict]

    def require(self) -> None:
        """Raise HoraError if anything is wrong."""
        if not self.ok:
            raise HoraError(f"an adapted model does what its plan says, but it does not:\n{self}")

    def __str__(self) -> str:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for finding in self.findings:
            groups.setdefault((finding.verdict, finding.question, finding.detail), []).append(finding.place)
        lines = []
        for (verdict, question, detail), places in sorted(groups.items(), key=lambda item: _ORDER[item[0][0]]):
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            lines.append(f"{verdict:8}{question}: {places[0]}{more}{': ' if detail else ''}{detail}")
        return "\n".join(lines)


_ORDER = {"wrong": 0, "unknown": 1, "ok": 2}
