"""Data: readers, filters, rendering, tokens on disk, packing, batches. Everything but `loader` imports without torch."""
