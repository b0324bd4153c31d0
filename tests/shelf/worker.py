"""A unit of work in a process of its own, as on another machine: a pickled task in, its pickled report out."""

from __future__ import annotations

import pickle
import sys
import threading

from tests.shelf import register


def main() -> None:
    register()
    task = pickle.load(sys.stdin.buffer)  # of the test's own
    sys.stdout.buffer.write(pickle.dumps(task.run(lambda count: None, threading.Event())))


if __name__ == "__main__":
    main()
