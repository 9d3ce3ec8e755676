"""Checks that clients and routers of other projects work with our server; needs their venvs.

`__main__` runs the checks, one file per kind of client. The `with_NAME.py` programs run alone, in a
client's venv, and import none of our modules.
"""
