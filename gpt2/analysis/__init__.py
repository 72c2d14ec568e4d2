"""Reading run folders, and comparing runs: tables, plots and an HTML page."""
