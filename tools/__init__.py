"""Programs beside the mains: `python -m tools.NAME --help`."""
