"""Options of the parity session, and the report it writes at its end."""

from pathlib import Path
from typing import Any

import pytest
from hora_spec.testing import Backend
from hora_spec.testing.mutants import MUTANTS

from .backends import COMPILER, jax_backend, torch_backend
from .report import ROOT, Report, Tally

FOLDER = ROOT / "results" / "parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--case", help="run tests of drawn cases on this one, a repr as the report prints it")
    group.addoption("--only", help="run the one test with this id; what the report's replay commands use")
    group.addoption("--plant", help="FRAMEWORK:MUTANT, such as 'jax:No normalisation', to be planted; tests fail")
    group.addoption("--report", type=Path, default=FOLDER, help="folder of the report")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # under pytest-xdist the controller alone sees all results
        config.pluginmanager.register(Reporter(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if only := config.getoption("--only", None):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid != only])
        items[:] = [item for item in items if item.nodeid == only]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where a test records what it compared; a property of the test, so that it reaches the reporting process."""
    lines: list[dict[str, Any]] = []
    request.node.user_properties.append(("parity", lines))
    return Tally(request.node.nodeid, lines)


@pytest.fixture(scope="session")
def backends(pytestconfig: pytest.Config) -> dict[str, Backend]:
    """Both frameworks in every way they run, one of them made wrong if ``--plant`` asks for it."""
    result = {
        "torch": torch_backend(),
        "torch merge": torch_backend("merge"),
        "torch compiled": torch_backend(compiler=COMPILER),
        "jax": jax_backend(),
        "jax merge": jax_backend("merge"),
        "jax eager": jax_backend(jit=False),
    }
    if planted := pytestconfig.getoption("--plant", None):
        framework, _, name = planted.partition(":")
        mutants = {mutant.name: mutant for mutant in MUTANTS}
        if framework not in result or name not in mutants:
            pytest.exit(
                f"--plant is torch or jax, a colon, and one of {sorted(mutants)}, got {planted!r}", returncode=4
            )
        for way, backend in result.items():
            if way.startswith(framework):
                result[way] = mutants[name].plant(backend)._replace(name=f"{backend.name} with {name}")
    return result


class Reporter:
    """Folds the tallies of all tests; a complete session whose report is no proof fails."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.report = Report()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.report.failures.append(report.nodeid)
        if report.when == "call":
            for name, value in report.user_properties:
                if name == "parity":
                    self.report.fold(value)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.report.lines or self._option("--plant"):
            return
        self.report.write(self._folder, complete=self._complete)
        if self._complete and self.report.problems() and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self.report.lines or self._option("--plant"):
            return
        terminalreporter.section("parity")
        for (family, backend), line in self.report.by_family().items():
            terminalreporter.line(f"{family:20} {backend:28} {line.cases:6} cases  worst {line.worst:.3g} of its bound")
        for problem in self.report.problems() if self._complete else ():
            terminalreporter.line(problem, red=True)
        terminalreporter.line(f"report: {self._folder / 'parity-report.md'}")

    @property
    def _complete(self) -> bool:
        """Whether the whole of this folder was asked for."""
        options = self.config.option
        partial = options.keyword or options.markexpr or self._option("--only") or self._option("--case")
        here = Path(__file__).parent
        whole = any(here.is_relative_to(Path(argument).resolve()) for argument in self.config.args)
        return whole and not partial

    @property
    def _folder(self) -> Path:
        return self._option("--report") or FOLDER

    def _option(self, name: str) -> Any:
        return self.config.getoption(name, None)
