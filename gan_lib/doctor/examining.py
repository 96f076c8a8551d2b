"""All checks, in the order in which they are done, and the code that says which of them failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from gan_lib.base.addresses import without_secrets
from gan_lib.base.errors import ParameterError, UserError, describe
from gan_lib.cluster.workers import in_thread
from gan_lib.doctor import cluster, machine, network, storage
from gan_lib.doctor.finding import FAULT, WARNING, Finding, not_checked
from gan_lib.doctor.patient import NoClusterError, Patient


class Check(NamedTuple):
    """What is asked, and how many seconds the answer may take: workers may first import torch."""

    ask: Callable[[Patient], Finding]
    seconds: float = 60.0

    @property
    def subject(self) -> str:
        """What it is about: machine, cluster, network or storage."""
        return self.ask.__module__.rpartition(".")[2]

    @property
    def name(self) -> str:
        """In a word or two."""
        return self.ask.__name__.replace("_", " ")

    @property
    def wanted(self) -> str:
        """How it is where it is well."""
        return (self.ask.__doc__ or "").splitlines()[0]


# By letter, for the code. Without I and O, which are read as 1 and 0.
CHECKS = {
    "A": Check(machine.packages, 120),
    "B": Check(machine.cores),
    "C": Check(machine.memory),
    "D": Check(machine.disk),
    "E": Check(machine.cache),
    "F": Check(machine.kernel),
    "G": Check(cluster.cluster, 120),
    "H": Check(machine.gpu),
    "J": Check(machine.shared_memory),
    "K": Check(machine.bfloat16),
    "L": Check(cluster.versions, 120),
    "M": Check(cluster.workers),
    "N": Check(cluster.one_gpu_each, 120),
    "P": Check(cluster.arithmetic),
    "R": Check(network.pairs),
    "S": Check(network.all_reduce, 180),
    "T": Check(storage.run_directory),
    "U": Check(storage.shared_cache),
    "V": Check(storage.clock),
    "W": Check(storage.source, 120),
}
WELL = "OK"


def examine(
    patient: Patient, letters: Iterable[str] = tuple(CHECKS)
) -> Iterator[tuple[str, Finding]]:
    """Letter and finding of each check, as they come. The patient is to be closed afterwards."""
    for letter in letters:
        yield letter, find(CHECKS[letter], patient)


def find(check: Check, patient: Patient) -> Finding:
    """What a check finds; also if it fails, or does not end."""
    answer = in_thread(lambda: check.ask(patient))
    try:
        return answer.result(check.seconds)
    except NoClusterError as error:
        return not_checked(str(error))
    except UserError as error:
        return Finding(FAULT, str(error))
    except Exception as error:
        if not answer.done():
            cure = "try it again; if it stays so, that machine or network hangs, or is very slow"
            return Finding(FAULT, f"no answer within {check.seconds:.0f} s", cure)
        return Finding(WARNING, f"the check itself failed: {without_secrets(describe(error))}")


def code_of(findings: Mapping[str, Finding]) -> str:
    """The letters of faults, or OK; and behind a hyphen those of warnings."""
    faults, warnings = (
        "".join(letter for letter, finding in findings.items() if finding.verdict == verdict)
        for verdict in (FAULT, WARNING)
    )
    return (faults or WELL) + (f"-{warnings}" if warnings else "")


def explain(code: str) -> list[str]:
    """What the code of an examination means, a line for each letter.

    Raises:
        ParameterError: if it is not one.
    """
    faults, _, warnings = code.upper().strip().partition("-")
    faults = "" if faults == WELL else faults
    unknown = [letter for letter in faults + warnings if letter not in CHECKS]
    if unknown or not code.strip():
        raise ParameterError(
            f"the code is {code!r}: expected {WELL} or some of {''.join(CHECKS)}, and a hyphen "
            "before the letters of warnings"
        )
    lines = [
        f"{letter}  {verdict:<8} {CHECKS[letter].subject:<8} {CHECKS[letter].name}: not so: "
        f"{CHECKS[letter].wanted}"
        for verdict, letters in ((FAULT, faults), (WARNING, warnings))
        for letter in letters
    ]
    return lines or ["all is well"]
