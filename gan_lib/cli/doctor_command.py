"""python -m gan_lib doctor: what works, what does not, and how to mend it."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from gan_lib.base.interrupts import interruptible
from gan_lib.cli import profiles
from gan_lib.cli.arguments import add_example, add_profile

if TYPE_CHECKING:
    from gan_lib.doctor.finding import Finding


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Give `python -m gan_lib doctor` its arguments."""
    parser.description = (
        "Try out machine, cluster, network and storage for a profile. The exit status is 1 if "
        "anything does not work, and the code at the end says what, in a few letters."
    )
    address, run = "-p address tcp://10.0.0.1:8786", "-p run s3://bucket/run"
    add_example(parser, f"doctor --profile dogs {address} {run}")
    add_profile(parser)
    parser.add_argument("--json", action="store_true", help="for programs, in place of lines")
    parser.add_argument("--code", help="only say what such a code means")
    parser.set_defaults(do=_doctor)


@interruptible()
def _doctor(options: argparse.Namespace) -> int:
    # Only now: whoever asks for help should not wait for Dask.
    from gan_lib.doctor.examining import CHECKS, code_of, examine, explain
    from gan_lib.doctor.finding import FAULT
    from gan_lib.doctor.patient import Patient

    if options.code is not None:
        print(*explain(options.code), sep="\n")
        return 0
    given = dict(options.parameter)
    patient = Patient(profiles.training_values(options.profile, given, look=False))
    findings: dict[str, Finding] = {}
    try:
        for letter, finding in examine(patient):
            findings[letter] = finding
            if not options.json:
                _print(letter, CHECKS[letter].name, finding)
    finally:
        patient.close()
    code = code_of(findings)
    if options.json:
        found = [
            {"letter": letter, "subject": CHECKS[letter].subject, "check": CHECKS[letter].name}
            | asdict(finding)
            for letter, finding in findings.items()
        ]
        print(json.dumps({"profile": options.profile, "code": code, "findings": found}, indent=2))
    else:
        print(f"code: {code}   (`python -m gan_lib doctor --code {code}` says what it means)")
    return int(any(finding.verdict == FAULT for finding in findings.values()))


def _print(letter: str, name: str, finding: Finding) -> None:
    width = min(shutil.get_terminal_size().columns, 120)
    begin = f"{letter} {finding.verdict:<12} {name:<15} "
    print(textwrap.fill(f"{begin}{finding.found}", width, subsequent_indent=" " * 6), flush=True)
    if finding.cure and finding.verdict != "ok":
        print(
            textwrap.fill(f"      to mend it: {finding.cure}", width, subsequent_indent=" " * 6),
            flush=True,
        )
