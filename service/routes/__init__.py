"""The routes, one module a noun: each parses, calls, answers."""
