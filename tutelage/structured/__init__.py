"""Structured output: grammars, JSON schemas, tool choice."""
