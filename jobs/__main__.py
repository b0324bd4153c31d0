"""python -m jobs VERB [key=value ...]."""

from jobs.cli import script

script()
