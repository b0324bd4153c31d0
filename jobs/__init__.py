"""weightmill as a program: verbs, jobs, reports."""

import sys

# Python runs a module by its name (-m), of which this package is the first part.
if sys.argv[:1] == ["-m"]:
    from jobs.cli.early import watch

    watch()
