"""The verbs of the command line: parse, call, report; the work is done elsewhere."""
