"""Structured output: grammars that restrict the text of a request, compiled and matched by xgrammar
in other processes."""
