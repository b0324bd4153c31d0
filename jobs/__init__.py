"""weightmill as a program: verbs, jobs, reports."""

import sys

# Python runs a module by its name (-m), of which this package is the first part. It may also be another program's that
# imports this package while it starts.
_OPTIONS = zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
if sys.argv[:1] == ["-m"] and any(name.split(".")[0] == __name__ for flag, name in _OPTIONS if flag[-1:] == "m"):
    from jobs.cli.early import watch

    watch()
