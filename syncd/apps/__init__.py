"""Vector stores for LangChain and LlamaIndex, and helpers for Alembic migrations."""
