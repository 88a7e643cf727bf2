"""The rooms of the command line, about one for each noun.

A room makes the groups of its nouns and puts their commands in, each with a decorator; a command that stands alone is a
function. `gradstore.cli` adds both to the app.
"""
