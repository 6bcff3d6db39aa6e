"""A stand-in provider that speaks the OpenAI Videos protocol. It runs no model."""
