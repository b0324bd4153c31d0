"""The benchmarks of `jobs.bench`: one file for each kind, and their shared timing and tables."""
