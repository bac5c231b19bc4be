"""Whether a release in constraints.txt has a known vulnerability: asks pip-audit, and says aloud if that cannot know.

make audit
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
# Vulnerabilities that are let pass: identifier -> why (no release without it within our ranges, or not reached here).
KNOWN: dict[str, str] = {}
UNREACHABLE = re.compile(r"ConnectionError|Could not connect|NameResolutionError|ConnectTimeout|ReadTimeout")


def verdict(report: Mapping[str, Any]) -> tuple[int, str]:
    """Exit code and what to say of a report of pip-audit, which also calls it a success if it could look up nothing."""
    releases = report["dependencies"]
    audited = [release for release in releases if "vulns" in release]
    if not audited:
        return 0, "audit skipped: the data on vulnerabilities cannot be reached"
    found = [
        f"{release['name']} {release['version']}: {vuln['id']}, mended in {', '.join(vuln['fix_versions']) or 'none'}"
        for release in audited
        for vuln in release["vulns"]
        if vuln["id"] not in KNOWN
    ]
    rest = [release["name"] for release in releases if "vulns" not in release]
    said = f"audit: {len(audited)} of {len(releases)} releases looked up, {len(found)} known vulnerabilities"
    return int(bool(found)), "\n".join([said + (f"; not: {', '.join(rest)}" if rest else ""), *found])


def main() -> int:
    """Audit constraints.txt; 0: nothing found or nothing to be known, 1: something found, or pip-audit failed."""
    flags = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "15"]
    command = [sys.executable, "-m", "pip_audit", *flags, "--requirement", str(CONSTRAINTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        code, said = verdict(json.loads(done.stdout))
    except ValueError:  # no report
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        code, said = (0, "") if UNREACHABLE.search(done.stderr) else (1, f"audit failed: {last}")
        said = said or "audit skipped: the data on vulnerabilities cannot be reached"
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main())
