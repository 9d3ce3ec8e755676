"""Imports matplotlib and draws once, so that a fork finds its fonts, parsers and writers loaded."""

import io

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

_figure, _axes = pyplot.subplots()
_axes.plot([1, 2], label="text")
_axes.legend()
_figure.colorbar(_axes.imshow([[1, 2]], cmap="RdBu_r"))
_figure.savefig(io.BytesIO())
pyplot.close(_figure)
