"""Search: the index of a catalog, the searcher over it, and what it has to beat."""
