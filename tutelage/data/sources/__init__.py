"""Readers of files and hubs, and the row formats they understand."""
