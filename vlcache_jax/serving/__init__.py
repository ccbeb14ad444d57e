"""OpenAI's chat API over an engine."""
