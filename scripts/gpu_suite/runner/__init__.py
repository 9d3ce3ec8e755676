"""Runs the sections of the suite: a process and a time limit for each, the report on disk after
every result, and a summary of one screen."""
