"""The report of scaling efficiency, made from measured runs at several numbers of ranks."""
