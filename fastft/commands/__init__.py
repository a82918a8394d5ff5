"""The verbs of the command line, one module each; `fastft.cli` puts them together."""
