"""A Hub for tests: see server.py. The fixture `hub` in tests/conftest.py runs it and points this process to it."""
