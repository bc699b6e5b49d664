"""Passes: one rewrite a file, grouped by job."""
