"""`/v1/responses`: the Open Responses core of OpenAI's Responses API."""
