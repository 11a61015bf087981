"""The OpenAI-compatible server and the chat in the terminal. Both import lazily: the extra `serve` is for the server alone."""
