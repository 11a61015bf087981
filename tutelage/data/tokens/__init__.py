"""Records to token ids on disk, to packed rows, to batches. Everything but `loader` imports without torch."""
