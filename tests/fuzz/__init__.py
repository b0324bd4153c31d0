"""Fuzzing of everything that reads a file or a command line of a stranger.

`mutations` has the strategies of Hypothesis that damage documents, bytes and pickles; `weights`, `pickled`,
`tokenizers` and `own` build the inputs of each reader from small valid files (`seeds`) and read them; `bounds` judges a
reading, `child` does it in a process with limits, and `campaign` runs many and keeps what they find in tests/hostile.
"""
