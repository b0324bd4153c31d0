"""Kills of a job from store to store, again and again: see campaign.py."""
