"""Stores of objects: S3, GCS, Azure, and what lies behind HTTP, by obstore."""
