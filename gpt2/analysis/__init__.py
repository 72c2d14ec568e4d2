"""Run folders read back: tables, pictures and HTML pages that compare runs."""
