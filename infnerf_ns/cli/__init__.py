"""Own commands (tyro)."""
