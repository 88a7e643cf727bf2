"""Choosing rows by their scores: arrays in, rows out.

    top.py       how many rows, which of them are candidates, and the best of them
    tasks.py     the scores of several tasks: as one, in turns, or balanced
    draws.py     rows at random
    make_up.py   what was chosen, and what was left out, counted

Equal scores are taken in the order of the pool everywhere, so that the same recipe chooses the same rows.
"""
