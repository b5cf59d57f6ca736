"""The command line: parse, call the API, render. Nothing here imports torch."""
