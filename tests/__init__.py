"""The tests, a package so that another one of that name on PYTHONPATH cannot take its place."""
