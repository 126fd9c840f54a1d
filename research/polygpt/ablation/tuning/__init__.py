"""A search for the best values of some fields: storage, trials, and what they show."""
