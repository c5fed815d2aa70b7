"""How good a system is: metrics, evaluation of rankings and indexes, pictures."""
