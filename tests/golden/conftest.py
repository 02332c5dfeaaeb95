"""At the end of a run: how many golden cases were checked, by group, and which were not. See `make test-golden`."""

import pytest

from tests.golden import golden

_PROPERTY = "golden_case"
_WORST = ("failed", "skipped", "passed")


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="fail unless every golden case of the folder is checked")


def pytest_collection_modifyitems(items):
    for item in items:  # reports carry properties, not marks; also from processes of xdist
        item.user_properties += [(_PROPERTY, list(mark.args)) for mark in item.iter_markers(_PROPERTY)]


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Count(config), "golden-count")


class _Count:
    """Outcome of every golden case: the worst of its tests."""

    def __init__(self, config):
        self.complete = config.getoption("--every-case", default=False)
        self.outcomes: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        for key, (group, *names) in (of for of in report.user_properties if of[0] == _PROPERTY):
            assert key == _PROPERTY
            for name in names:
                before = self.outcomes.get((group, name), "passed")
                self.outcomes[group, name] = min(before, report.outcome, key=_WORST.index)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.complete and session.exitstatus == pytest.ExitCode.OK and self._problems():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if not self.outcomes and not self.complete:
            return
        terminalreporter.section(f"golden cases of {golden.FOLDER}")
        for group, names in golden.inventory().items():
            found = [self.outcomes.get((group, name), "not checked") for name in names]
            if self.complete or set(found) != {"not checked"}:
                counts = ", ".join(
                    f"{found.count(kind)} {kind}" for kind in (*_WORST[::-1], "not checked") if kind in found
                )
                terminalreporter.line(f"{group}: {len(names)} cases: {counts}")
        passed = list(self.outcomes.values()).count("passed")
        terminalreporter.line(f"{passed} cases passed")
        for problem in self._problems() if self.complete else []:
            terminalreporter.line(f"error: {problem}", red=True)

    def _problems(self) -> list[str]:
        inventory = golden.inventory()
        if not inventory:
            return [f"{golden.FOLDER} holds no golden numbers: set KDBENCH_GOLDEN to their folder"]
        found = [
            f"{group}: {name} {self.outcomes.get((group, name), 'was not checked')}"
            for group, names in inventory.items()
            if any((group, name) in self.outcomes for name in names)
            for name in names
            if self.outcomes.get((group, name)) != "passed"
        ]
        untested = [group for group, names in inventory.items() if not any((group, n) in self.outcomes for n in names)]
        return found + [f"{group}: no test checks this group" for group in untested]
