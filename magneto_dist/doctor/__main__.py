"""Looks at this machine, tries what training needs, and says what to mend: a line each.

python -m magneto_dist.doctor [--output_dir DIR] [--json]

ok: fine. warn: works, but slower or in fewer ways. fail: will not work. Exit code 1 if any fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from magneto_dist.doctor.machine import machine_findings
from magneto_dist.doctor.trials import trial_findings


def main() -> int:
    """Prints the findings; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m magneto_dist.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs"), help="where runs will be (default: runs)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--timeout_s", type=float, default=60.0, help="seconds for each trial (default: 60)"
    )
    options = parser.parse_args()
    findings = []
    for source in (machine_findings(options.output_dir), trial_findings(options.timeout_s)):
        for finding in source:
            findings.append(finding)
            if not options.json:
                print(finding, flush=True)
    worst = next((s for s in ("fail", "warn") if any(f.state == s for f in findings)), "ok")
    if options.json:
        print(json.dumps({"state": worst, "findings": [asdict(f) for f in findings]}, indent=1))
    return int(worst == "fail")


if __name__ == "__main__":
    sys.exit(main())
