"""python -m jobs VERB [key=value ...]."""

from jobs.cli.main import script

script()
