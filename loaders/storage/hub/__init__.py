"""Repositories of the Hugging Face Hub: read by ranges of a pinned commit, written by one commit."""
