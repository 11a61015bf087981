"""Chat templates, the renderer (messages to token ids and loss mask) and tool calls: one room for both directions."""
