"""What the parity tests measured, at the end of the run."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The lines that tests recorded under "parity"."""
    reports = [
        r for r in terminalreporter.getreports("passed") + terminalreporter.getreports("failed") if r.when == "call"
    ]
    lines = [text for report in reports for name, text in report.user_properties if name == "parity"]
    if lines:
        terminalreporter.section("parity with torch; errors as multiples of EPS * (1 + |mean| / std)")
        terminalreporter.write_line("\n".join(lines))
