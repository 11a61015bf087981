"""Collecting, filtering, deduplicating, splitting and describing records."""
