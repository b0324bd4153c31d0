"""The rows of `jobs.bench kernels`: a file for each engine, and how they are timed."""
