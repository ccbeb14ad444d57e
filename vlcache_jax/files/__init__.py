"""Files of people one does not trust, and what is written back: the only readers and writers of the library."""
