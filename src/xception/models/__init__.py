"""Architectures only: nothing here downloads, logs or parses arguments."""
