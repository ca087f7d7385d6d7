"""Data: embedded defaults and the user's own files."""
