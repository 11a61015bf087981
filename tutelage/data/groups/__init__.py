"""Completions that share a prompt: preferences, ratings, labelled texts, translations."""
