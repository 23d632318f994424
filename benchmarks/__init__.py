"""What speed and memory claims rest on: each script prints a table and writes JSON."""
