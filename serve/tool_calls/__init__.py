"""Calls of tools and reasoning in the text of a chat: the forms of the model families, the grammars
that restrict an output to them, and the parsers that divide it."""
