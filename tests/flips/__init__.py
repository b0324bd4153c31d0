"""Flips of single bits in what weightmill published, and in what a killed job left: see campaign.py."""
