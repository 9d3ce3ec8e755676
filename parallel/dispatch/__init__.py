"""Token dispatchers: one strategy per file, all with the interface `models.moe.Dispatcher`."""
