"""Runs model-written Python behind walls, and proves the walls before it does."""
