"""Kills of jobs, again and again: from store to store in campaign.py, in folders in folders.py."""
