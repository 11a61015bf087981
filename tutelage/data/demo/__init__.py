"""Data that every Python installation carries, and small verifiable skills: for the quickstart and for tests."""
