"""Backends: each lowers a program to an artifact and loads it as a session."""
