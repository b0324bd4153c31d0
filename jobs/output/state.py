"""What is known of outputs and jobs from outside: from reports, journals and signs of life, on any machine.

Nothing of a job is changed by looking. What is in a journal is a file of somebody's: sizes are bounded, and what is
damaged is said to be.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jobs.output.journal import LEFT_OUT, LIFE, LOGITS
from jobs.output.life import SILENT_S, Life, life_from
from jobs.output.report import Report, read_report
from loaders.errors import BadCheckpoint, StorageError, WeightmillError
from loaders.limits import JSON_REPORT
from loaders.storage import kind_of, open_store
from loaders.storage.address import Address
from loaders.storage.base import OUR_REPORT, Abandoned
from loaders.storage.folder_destination import SUFFIX
from loaders.storage.hashes import unsealed

REQUEST = "job.json"
MOST_BYTES = {LIFE: 4 << 20, REQUEST: JSON_REPORT}
TRIES = 3  # a file that a running job writes anew while it is read is read again

# complete: the output is there. running: its driver gives signs of life. silent: it holds the journal and gives none,
# as one that is frozen, or whose machine is gone. stopped, failed: nobody works on it, and what is done is kept.
Word = Literal["complete", "running", "silent", "stopped", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalState:
    """A journal as it is found. `request` and `life` are what it says, if it does; `sign_age_s` the age of its sign."""

    address: Address
    output: str
    word: Word
    units_done: int
    units: int | None  # None if it does not say
    request: Mapping[str, Any] | None
    life: Life | None
    sign_age_s: float | None
    size: int
    age_s: float
    fault: str  # what of it is damaged; "" if nothing is


def journals_in(place: Address, name: str | None = None) -> list[JournalState]:
    """Return the journals in a folder of outputs: of all outputs, or of one by its name; the newest first.

    Raises:
        StorageError: the place cannot be listed.
    """
    kind = kind_of(place)
    left = () if kind.destination is None else kind.abandoned(place, name)
    states = [journal_state(each) for each in left if each.address.name != LOGITS]
    return sorted(states, key=lambda each: (each.word not in ("running", "silent"), each.age_s))


def journal_state(left: Abandoned) -> JournalState:
    """Read what a journal says."""
    request, life = _request(left.address), _life(left.address)
    about = request if request is not None else {}
    units, sign_age_s = about.get("units"), left.ages_s.get(LIFE)
    damaged = [name for name, found in ((REQUEST, request), (LIFE, life)) if found is None and name in left.ages_s]
    said_units = life.units if life is not None else units if isinstance(units, int) else None
    return JournalState(
        address=left.address,
        output=_output_of(left.address, about),
        word=_word(left, life, sign_age_s),
        units_done=left.units_done,
        units=said_units,
        request=request,
        life=life,
        sign_age_s=sign_age_s,
        size=left.size,
        age_s=left.age_s,
        fault=f"{', '.join(damaged)}: damaged, or of another version of weightmill" if damaged else "",
    )


def report_of(output: Address) -> Report | None:
    """Return the report of an output; None if there is no output.

    Raises:
        BadSpec, BadCheckpoint: there is a report that cannot be read.
    """
    return None if open_store(output).find(OUR_REPORT) is None else read_report(output)


def _word(left: Abandoned, life: Life | None, sign_age_s: float | None) -> Word:
    if life is not None and life.state != "running" and not left.is_held:
        # Of what was published, only the journal is left to remove.
        return {"stopped": "stopped", "failed": "failed", "published": "stopped"}[life.state]  # type: ignore[return-value]
    is_fresh = sign_age_s is not None and sign_age_s <= (SILENT_S if life is None else life.silent_after_s)
    if left.is_held:
        # Before its first sign a driver looks at what was done before, which may take long.
        return "running" if is_fresh or sign_age_s is None else "silent"
    # Locks of other machines are not always seen here, those of this one are.
    if life is not None and life.host != socket.gethostname() and is_fresh:
        return "running"
    return "failed" if LEFT_OUT in left.ages_s else "stopped"


def _output_of(journal: Address, request: Mapping[str, Any]) -> str:
    """Return the output of a journal by where it is; on the Hub, whose journals are elsewhere, by what it says."""
    said = request.get("output")
    if isinstance(said, str) and said.startswith("hf://"):
        return said
    if journal.is_local:
        found = re.fullmatch(rf"\.(.+)\.[0-9a-f]{{12}}{re.escape(SUFFIX)}", journal.name)
        return str(journal.parent / (found[1] if found else journal.name))
    return str(journal.parent.parent)


def _request(journal: Address) -> Mapping[str, Any] | None:
    raw = _small(journal, REQUEST)
    try:
        found = None if raw is None else unsealed(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _life(journal: Address) -> Life | None:
    raw = _small(journal, LIFE)
    return None if raw is None else life_from(raw)


def _small(journal: Address, name: str) -> bytes | None:
    """Return a small file of a journal; None if it is not there, not small, or cannot be read."""
    for _ in range(TRIES):
        store = open_store(journal)
        try:
            entry = store.find(name)
            if entry is None or entry.size > MOST_BYTES[name]:
                return None
            return bytes(store.read(entry, 0, entry.size))
        # It was written anew meanwhile.
        except (BadCheckpoint, StorageError):
            continue
        except WeightmillError:
            return None
    return None
