"""Token dispatchers: one strategy per file, all behind `models.moe.Dispatcher`."""
