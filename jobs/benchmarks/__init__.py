"""The benchmarks of `weightmill bench`: one file for each kind, and their shared timing and tables."""
