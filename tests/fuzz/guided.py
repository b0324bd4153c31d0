"""Coverage guides: libFuzzer, by atheris, chooses the bytes from which Hypothesis draws a reader's cases.

python -m tests.fuzz.guided READER FOLDER SECONDS SEED

What fails goes into a database of Hypothesis, which shrinks it in another process; counts go into counts.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def main(reader: str, folder: Path, seconds: int, seed: int) -> None:
    import atheris

    # numba compiles kernels from their bytecode, which is to stay as it is.
    with atheris.instrument_imports(include=["jobs", "loaders"], exclude=["loaders.quantization.kernels"]):
        from tests.fuzz import bounds, child
    child.prepare(folder)
    place = folder / "guided" / reader
    work = place / str(os.getpid())
    (place / "corpus").mkdir(exist_ok=True)
    work.mkdir()
    trial = child.Trial(reader, work, set())
    trial.warm()
    test = trial.test(1, database=str(place))
    try_one = test.hypothesis.fuzz_one_input  # type: ignore[attr-defined]
    ends = time.monotonic() + seconds

    def try_bytes(data: bytes) -> None:
        with suppress(bounds.Found):
            try_one(data)
        trial.known |= trial.tally.found.keys()
        if time.monotonic() > ends:
            (place / "counts.json").write_text(json.dumps(trial.tally.counts))
            os._exit(0)

    limits = [f"-artifact_prefix={place}/", "-rss_limit_mb=0", "-timeout=3600", "-max_len=4096", "-verbosity=0"]
    atheris.Setup(["fuzz", str(place / "corpus"), f"-seed={seed}", *limits], try_bytes)
    atheris.Fuzz()


if __name__ == "__main__":
    name, where, duration, number = sys.argv[1:]
    main(name, Path(where), int(duration), int(number))
