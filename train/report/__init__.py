"""Reports of a run: metrics, console, pictures, environment, the diagnosis of FP8."""
